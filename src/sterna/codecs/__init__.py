"""What travels: codecs turn named tensors into messages and back."""

from sterna.codecs.entropy import Entropy
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.fp16 import Fp16
from sterna.codecs.identity import Identity
from sterna.codecs.quantise import Quantise
from sterna.codecs.terngrad import TernGrad
from sterna.codecs.warm_up import WarmUp

__all__ = ["Entropy", "ErrorFeedback", "Fp16", "Identity", "Quantise", "TernGrad", "WarmUp"]
