"""Generation, evaluation, and the check that a model keeps the promise of equal forms."""

from statewise.inference.evaluate import Evaluation, evaluate_bits_per_byte
from statewise.inference.generate import Generation, fit_state, generate, read_tokens
from statewise.inference.sampling import SamplingRule, choose_token
from statewise.inference.session import load_session, save_session
from statewise.inference.step_graph import StepGraph
from statewise.inference.verify import LawResult, stir, verify
from statewise.inference.verify_images import verify_images

__all__ = [
    "Evaluation",
    "Generation",
    "LawResult",
    "SamplingRule",
    "StepGraph",
    "choose_token",
    "evaluate_bits_per_byte",
    "fit_state",
    "generate",
    "load_session",
    "read_tokens",
    "save_session",
    "stir",
    "verify",
    "verify_images",
]
