"""LeNet as in Caffe's MNIST example, the network that many papers on compression mean by LeNet-5.

    conv 20 of 5x5, max pool 2 - conv 50 of 5x5, max pool 2 - fc 500, ReLU - fc 10

Reference: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-based learning applied to document
recognition. Proceedings of the IEEE 86(11), 1998; sizes from Caffe,
``examples/mnist/lenet.prototxt``.

Differs from the paper: as Caffe's does: wider, max pooling, one ReLU, a softmax output. Differs
from Caffe: weights start as PyTorch draws them (Caffe: Xavier, zero biases).

Cost per step: 2.3 million multiply-adds an example forward.
"""

from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "batch channels 28 28"]
Logits = Float[Tensor, "batch classes"]


class LeNet5(nn.Module):
    """Caffe's LeNet for 28x28 pictures.

    Args:
        classes: number of classes.
        channels: colours of the input, 1 for MNIST.

    Raises:
        ValueError: an argument is below 1.

    Example:
        >>> model = LeNet5()
        >>> sum(p.numel() for p in model.parameters())
        431080
        >>> import torch
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        for name, value in (("classes", classes), ("channels", channels)):
            if value < 1:
                raise ValueError(f"LeNet5: {name} must be at least 1; got {value}.")
        self.conv1 = nn.Conv2d(channels, 20, kernel_size=5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Images) -> Logits:
        """Logits, shape (batch, classes)."""
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = self.relu(self.fc1(self.flatten(x)))
        out: Tensor = self.fc2(x)
        return out
