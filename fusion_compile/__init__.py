"""Diffusion transformers trained as one compiled program and sampled from a table."""

from fusion_compile import optim as optim
from fusion_compile._state.no_decay import no_decay as no_decay
from fusion_compile._state.warm_start import WarmStart as WarmStart
from fusion_compile._step.loss_scale import LossScale as LossScale
from fusion_compile.ema import EMA as EMA
from fusion_compile.explain import Explanation as Explanation
from fusion_compile.explain import explain as explain
from fusion_compile.explain._subjects.registry import Subject, register
from fusion_compile.explain._subjects.sampler import explain_sampler
from fusion_compile.sampler import Batched as Batched
from fusion_compile.sampler import Exact as Exact
from fusion_compile.sampler import Rank as Rank
from fusion_compile.sampler import Sampler as Sampler
from fusion_compile.sampler import SamplerReport as SamplerReport
from fusion_compile.sampler import optimize_sampler as optimize_sampler
from fusion_compile.scalar_logger import ScalarLogger as ScalarLogger
from fusion_compile.torch_optimizer import TorchOptimizer as TorchOptimizer
from fusion_compile.training_step import TrainingStep as TrainingStep
from fusion_compile.training_step import compile_training_step as compile_training_step

__version__ = "0.2.0.dev0"

register(
    TrainingStep,
    Subject(
        explain=lambda step, device: step.explain(device=device),
        is_compiled=lambda step: bool(step.programs),
        state=lambda step: step.state_dict(),
        restore=lambda step, saved: step.load_state_dict(saved),
    ),
)
register(Sampler, Subject(explain=explain_sampler))
