"""Diffusion transformers trained as one compiled program and sampled from a table."""

from fusion_compile import optim as optim
from fusion_compile.explain import Explanation as Explanation
from fusion_compile.explain import explain as explain
from fusion_compile.sampler import Batched as Batched
from fusion_compile.sampler import Exact as Exact
from fusion_compile.sampler import Rank as Rank
from fusion_compile.sampler import Sampler as Sampler
from fusion_compile.sampler import SamplerReport as SamplerReport
from fusion_compile.sampler import optimize_sampler as optimize_sampler
from fusion_compile.scalar_logger import ScalarLogger as ScalarLogger
from fusion_compile.training_step import TrainingStep as TrainingStep
from fusion_compile.training_step import compile_training_step as compile_training_step

__version__ = "0.1.0.dev0"
