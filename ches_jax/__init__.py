"""Likelihood displacement in preference optimisation, in JAX.

>>> import ches_jax as cj
>>> cj.TrainConfig(loss="dpo", lr=1e-5).loss
'dpo'

Importing the package loads nothing; a name's module (and jax, where it needs it) is imported when the name is first
used. The verbs of the command line are functions of a config: ``cj.score(cj.ScoreConfig(pairs="pairs.jsonl"))``.
"""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names

if TYPE_CHECKING:
    from ches_jax import bundled as bundled
    from ches_jax.convert import ConvertConfig as ConvertConfig
    from ches_jax.convert import convert as convert
    from ches_jax.data.tokenize import load_tokenizer as load_tokenizer
    from ches_jax.displacement.changes import displacement_summary as displacement_summary
    from ches_jax.displacement.config import DiagnoseConfig as DiagnoseConfig
    from ches_jax.displacement.diagnose import diagnose as diagnose
    from ches_jax.doctor import DoctorConfig as DoctorConfig
    from ches_jax.doctor import doctor as doctor
    from ches_jax.errors import ChesError as ChesError
    from ches_jax.forecast.config import ForecastConfig as ForecastConfig
    from ches_jax.forecast.config import GroupsConfig as GroupsConfig
    from ches_jax.forecast.config import InfluenceConfig as InfluenceConfig
    from ches_jax.forecast.group_run import groups as groups
    from ches_jax.forecast.run import forecast as forecast
    from ches_jax.forecast.run import influence as influence
    from ches_jax.generate.config import GenerateConfig as GenerateConfig
    from ches_jax.generate.run import generate as generate
    from ches_jax.judges.config import JudgeConfig as JudgeConfig
    from ches_jax.judges.run import judge as judge
    from ches_jax.label.config import LabelConfig as LabelConfig
    from ches_jax.label.run import label as label
    from ches_jax.losses import LossInputs as LossInputs
    from ches_jax.losses import get_loss as get_loss
    from ches_jax.losses import incentives as incentives
    from ches_jax.models import load_model as load_model
    from ches_jax.report.page import report as report
    from ches_jax.scores.arrays import ches as ches
    from ches_jax.scores.arrays import head_score as head_score
    from ches_jax.scores.arrays import ln_ches as ln_ches
    from ches_jax.scores.arrays import pair_statistics as pair_statistics
    from ches_jax.scores.config import ScoreConfig as ScoreConfig
    from ches_jax.scores.in_memory import score_pairs as score_pairs
    from ches_jax.scores.run import score as score
    from ches_jax.select.config import SelectConfig as SelectConfig
    from ches_jax.select.run import select as select
    from ches_jax.train.config import TrainConfig as TrainConfig
    from ches_jax.train.loop import train as train
    from ches_jax.verify import verify as verify

__version__ = "0.3.0"

_HOMES = {
    # a model, its tokenizer, and what ships with the package
    "load_model": "ches_jax.models",
    "load_tokenizer": "ches_jax.data.tokenize",
    "bundled": "ches_jax.bundled",
    # mathematics on arrays
    "score_pairs": "ches_jax.scores.in_memory",
    "pair_statistics": "ches_jax.scores.arrays",
    "ches": "ches_jax.scores.arrays",
    "ln_ches": "ches_jax.scores.arrays",
    "head_score": "ches_jax.scores.arrays",
    "displacement_summary": "ches_jax.displacement.changes",
    "get_loss": "ches_jax.losses",
    "LossInputs": "ches_jax.losses",
    "incentives": "ches_jax.losses",
    # the verbs of the command line, and their options
    "score": "ches_jax.scores.run",
    "ScoreConfig": "ches_jax.scores.config",
    "select": "ches_jax.select",
    "SelectConfig": "ches_jax.select.config",
    "train": "ches_jax.train",
    "TrainConfig": "ches_jax.train.config",
    "forecast": "ches_jax.forecast",
    "ForecastConfig": "ches_jax.forecast.config",
    "influence": "ches_jax.forecast.run",
    "InfluenceConfig": "ches_jax.forecast.config",
    "groups": "ches_jax.forecast.group_run",
    "GroupsConfig": "ches_jax.forecast.config",
    "diagnose": "ches_jax.displacement.diagnose",
    "DiagnoseConfig": "ches_jax.displacement.config",
    "generate": "ches_jax.generate",
    "GenerateConfig": "ches_jax.generate.config",
    "judge": "ches_jax.judges.run",
    "JudgeConfig": "ches_jax.judges.config",
    "label": "ches_jax.label.run",
    "LabelConfig": "ches_jax.label.config",
    "report": "ches_jax.report",
    "doctor": "ches_jax.doctor",
    "DoctorConfig": "ches_jax.doctor",
    "convert": "ches_jax.convert",
    "ConvertConfig": "ches_jax.convert",
    "verify": "ches_jax.verify",
    # everything a user can mend
    "ChesError": "ches_jax.errors",
}
__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
