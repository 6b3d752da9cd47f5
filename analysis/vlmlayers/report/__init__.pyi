from .compare import write_comparison as write_comparison
from .figures import write_figures as write_figures
from .page import write_report as write_report
