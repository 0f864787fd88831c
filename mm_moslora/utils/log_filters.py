"""Importing it keeps libraries from saying on stderr, when they are imported, what nobody can act on.

peft and transformers import bitsandbytes and torchao where they are installed, and these say that optional kernels are
missing and that torch will refuse an enum one day. diffusers looks for classes that torchao no longer has. Nothing else
of theirs is silenced.
"""

import logging

_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao`",
}


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])


for _name in _NOISE:
    logging.getLogger(_name).addFilter(_is_no_noise)
