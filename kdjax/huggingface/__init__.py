"""Language models in Hugging Face's format: folders of ``config.json`` and ``*.safetensors``, read and written.

No model code of theirs is run: the names of the tensors and the meaning of the config are what is shared.
"""

from kdjax.huggingface.config import ARCHITECTURES, architecture_of, read_config
from kdjax.huggingface.load import load
from kdjax.huggingface.save import save

__all__ = ["ARCHITECTURES", "architecture_of", "load", "read_config", "save"]
