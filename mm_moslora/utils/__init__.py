"""What every package may use: errors, files, processes, numbers and text.

Its import also suppresses warnings that users cannot act on and that libraries log during their own import, or, of an
8-bit product, for every input.
peft and transformers import bitsandbytes and torchao where they are installed. These log that optional kernels are
missing and that a future torch will refuse an enum. diffusers looks for classes that torchao has removed. No other
messages of these libraries are suppressed.
transformers 5.25 replaces parts of a model by code from the hub unless USE_HUB_KERNELS forbids it. It brings a package
with which bitsandbytes downloads code at its import unless LOCAL_KERNELS names a local folder. The import of this
package sets both where they are not set, so that no code is downloaded.
"""

import logging
import os

os.environ.setdefault("USE_HUB_KERNELS", "NO")
os.environ.setdefault("LOCAL_KERNELS", f"kernels-community/quantization-bitsandbytes={os.devnull}")

_NOISE = {
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao`",
}


for _name in _NOISE:
    logging.getLogger(_name).addFilter(lambda record: not str(record.msg).startswith(_NOISE[record.name]))
