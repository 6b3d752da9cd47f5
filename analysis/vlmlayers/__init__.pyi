from . import metrics as metrics
from . import models as models
from . import plots as plots
from .errors import UserError as UserError
from .features import LayerFeatures as LayerFeatures
from .manifests import Manifest as Manifest
from .models import extract as extract
from .models import load_model as load_model
from .placement import Placement as Placement
from .plots.explore import explore as explore
from .report import write_report as write_report
from .scores import read_scores as read_scores
from .scores import score as score
from .scores import write_scores as write_scores
from .selection import LayerChoice as LayerChoice
from .selection import predict as predict
from .selection import select as select
from .study import open_run as open_run
from .study import read_study as read_study
from .study import run_study as run_study

__version__: str
