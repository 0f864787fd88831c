"""mm_moslora: assemble a vision-language model, tune it with MoSLoRA, measure it, export it."""

import lazy_loader

import mm_moslora.utils  # noqa: F401  (its log filters, before anything imports peft or transformers)

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names of __init__.pyi


def __getattr__(name: str) -> object:
    """Import a public name at its first use: `import mm_moslora` itself loads no torch."""
    if name == "__version__":
        from mm_moslora.utils.package_requirements import installed_version

        return installed_version("mm-moslora") or "0+unknown"
    return _public(name)
