"""What every package may use: errors, files, processes, numbers and text.

Its import also suppresses warnings that users cannot act on and that libraries log during their own import, or, of an
8-bit product, for every input.
peft and transformers import bitsandbytes and torchao where they are installed. These log that optional kernels are
missing and that a future torch will refuse an enum. diffusers looks for classes that torchao has removed. No other
messages of these libraries are suppressed.
"""

import logging

_NOISE = {
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao`",
}


for _name in _NOISE:
    logging.getLogger(_name).addFilter(lambda record: not str(record.msg).startswith(_NOISE[record.name]))
