from .adapters import MoSLoRAConfig as MoSLoRAConfig
from .adapters import add_moslora as add_moslora
from .adapters import export_adapter as export_adapter
from .adapters import load_adapter as load_adapter
from .adapters import merge as merge
from .adapters import save_adapter as save_adapter
from .config import read_recipe as read_recipe
from .models.assembly import load_parts as load_parts
from .models.load_model import load as load
from .training.training_loop import train as train

__version__: str
