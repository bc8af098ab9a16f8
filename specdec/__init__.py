"""specdec: speculative decoding whose output distribution is proved, on any unmodified Hugging Face causal LM."""

from specdec import demo, display, drafters, prediction, rules, testing, theory, trace, trees, tuning
from specdec.coins import Coins
from specdec.custom_generate import custom_generate
from specdec.engines.graphs import Graphs
from specdec.generate import Generation, generate, stream
from specdec.laws import Law
from specdec.models.joined_weights import join_weights
from specdec.models.stored_weights import store_weights
from specdec.models.target import ModelTarget
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec
from specdec.tuning import Plan, tune

__version__ = "0.1.0"

__all__ = [
    "Coins",
    "DraftTree",
    "Generation",
    "Graphs",
    "Law",
    "ModelTarget",
    "Plan",
    "Sampling",
    "Topology",
    "TreeSpec",
    "custom_generate",
    "demo",
    "display",
    "drafters",
    "generate",
    "join_weights",
    "prediction",
    "rules",
    "store_weights",
    "stream",
    "testing",
    "theory",
    "trace",
    "trees",
    "tune",
    "tuning",
]
