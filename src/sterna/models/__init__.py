"""Models: small networks, plain ``nn.Module`` that ``torch.fx`` can trace."""

from sterna.models.cnn import SmallCNN
from sterna.models.lenet import LeNet5
from sterna.models.lstm import LSTMLanguageModel
from sterna.models.mlp import MLP
from sterna.models.resnet import ResNet
from sterna.models.rhn import RHNLanguageModel

__all__ = ["MLP", "LSTMLanguageModel", "LeNet5", "RHNLanguageModel", "ResNet", "SmallCNN"]
