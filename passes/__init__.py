"""Passes over ``torch.fx`` graphs: a graph in, a graph and a report out.

This package imports only torch and itself. Finders, whose names begin with ``find_``, change nothing.
"""

from ._cost import Exchange as Exchange
from ._cost import count_launches as count_launches
from ._cost import exchange_rates as exchange_rates
from ._dependence import BindingTime as BindingTime
from ._dependence import binding_times as binding_times
from ._finding import KINDS as KINDS
from ._finding import Finding as Finding
from ._finding import Severity as Severity
from ._graph import format_graph as format_graph
from ._graph import format_node as format_node
from ._pass import Declined as Declined
from ._pass import Pass as Pass
from ._pass import PassReport as PassReport
from ._pass import run_passes as run_passes
from ._region import count_regions as count_regions
from .drop_metadata_reads import drop_metadata_reads as drop_metadata_reads
from .factor_conditioning import Curve as Curve
from .factor_conditioning import Factored as Factored
from .factor_conditioning import FactoredLayer as FactoredLayer
from .factor_conditioning import Fit as Fit
from .factor_conditioning import factor_conditioning as factor_conditioning
from .find_host_syncs import find_host_syncs as find_host_syncs
from .fold_repeated_regions import fold_repeated_regions as fold_repeated_regions
from .hoist_time_conditioning import Hoisted as Hoisted
from .hoist_time_conditioning import Stage as Stage
from .hoist_time_conditioning import hoist_time_conditioning as hoist_time_conditioning
from .lower_to_aten import lower_to_aten as lower_to_aten
from .outline_runs import outline_runs as outline_runs
from .outline_tail import outline_tail as outline_tail
from .packed_rows import RowBuffer as RowBuffer
from .packed_rows import lay_out_residuals as lay_out_residuals
from .packed_rows import pack_outputs as pack_outputs
from .split_concatenations import split_concatenations as split_concatenations
from .write_into_joins import write_into_joins as write_into_joins
