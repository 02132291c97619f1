"""Optimizers composed from published parts: transforms, `chain`, `partition`, schedules and recipes."""

from fusion_compile.optim._combine import chain as chain
from fusion_compile.optim._combine import partition as partition
from fusion_compile.optim._schedules import Schedule as Schedule
from fusion_compile.optim._schedules import constant as constant
from fusion_compile.optim._schedules import cosine as cosine
from fusion_compile.optim._schedules import linear as linear
from fusion_compile.optim._transform import Context as Context
from fusion_compile.optim._transform import EmptyState as EmptyState
from fusion_compile.optim._transform import Named as Named
from fusion_compile.optim._transform import Transform as Transform
from fusion_compile.optim.clip import clip_by_global_norm as clip_by_global_norm
from fusion_compile.optim.decay_weights import add_decayed_weights as add_decayed_weights
from fusion_compile.optim.normalize_neurons import normalize_neurons as normalize_neurons
from fusion_compile.optim.orthogonalize import orthogonalize as orthogonalize
from fusion_compile.optim.recipes import RECIPES as RECIPES
from fusion_compile.optim.recipes import adamw as adamw
from fusion_compile.optim.recipes import muon as muon
from fusion_compile.optim.recipes import normuon as normuon
from fusion_compile.optim.recipes import sf_adamw as sf_adamw
from fusion_compile.optim.recipes import sf_normuon as sf_normuon
from fusion_compile.optim.scale_by_adam import scale_by_adam as scale_by_adam
from fusion_compile.optim.scale_by_adam import scale_by_rms as scale_by_rms
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate as scale_by_learning_rate
from fusion_compile.optim.scale_by_shape import scale_by_shape as scale_by_shape
from fusion_compile.optim.schedule_free import schedule_free as schedule_free
