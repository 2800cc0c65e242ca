"""Models as users write them, each with an example, for the tests of surgery."""

import torch
import torch.nn.functional as F
from torch import nn

from sterna.models.rhn import RHNLanguageModel


class PlainCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5))

    def forward(self, x):
        return self.classifier(self.features(x))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        return F.log_softmax(self.fc2(x), dim=1)


class LiteralLeNet(LeNet):
    """The size of the flattened image is written in numbers."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 400)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


class AttributeLeNet(LeNet):
    """The size of the flattened image is an attribute."""

    def __init__(self):
        super().__init__()
        self.flat = 16 * 5 * 5

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.view(-1, self.flat)))
        return self.fc2(x)


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PadShortcutResNet(nn.Module):
    """Shortcut without parameters: every second pixel, and channels of zeros."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.conv0(x))
        out = self.conv2(F.relu(self.conv1(x)))
        out = out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.fc(F.relu(out).mean(dim=(2, 3)))


class DoubleConv(nn.Sequential):
    def __init__(self, a, b):
        super().__init__(
            nn.Conv2d(a, b, 3, padding=1),
            nn.BatchNorm2d(b),
            nn.ReLU(inplace=True),
            nn.Conv2d(b, b, 3, padding=1),
            nn.GroupNorm(2, b),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.mid = DoubleConv(1, 4), DoubleConv(4, 8), DoubleConv(8, 16)
        self.up2 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.dec2 = DoubleConv(16, 8)
        self.up1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.dec1 = DoubleConv(12, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        c = self.dec2(torch.cat([self.up2(c), b], dim=1))
        c = self.dec1(torch.cat([self.up1(c), a], dim=1))
        return torch.sigmoid(self.head(c))


class DenseNet(nn.Module):
    def __init__(self, growth=4, num_layers=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layers = nn.ModuleList()
        for k in range(num_layers):
            width = 8 + k * growth
            self.layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1)
                )
            )
        self.transition = nn.Conv2d(8 + num_layers * growth, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.avg_pool2d(self.transition(torch.cat(features, 1)), 2)
        return self.fc(x.mean([2, 3]))


class ResNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.reduce = nn.Conv2d(8, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.expand = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.bn1(self.reduce(x)))
        y = F.relu(self.bn2(self.grouped(y)))
        x = F.relu(x + self.expand(y))
        return self.fc(x.amax((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, reduction=2):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x):
        b, c, _, _ = x.size()
        s = F.adaptive_avg_pool2d(x, 1).view(b, c)
        s = torch.sigmoid(self.fc2(F.relu(self.fc1(s)))).view(b, c, 1, 1)
        return x * s.expand_as(x)


class MobileNet(nn.Module):
    """Depthwise separable convolutions, with or without squeeze and excitation."""

    def __init__(self, squeeze=False):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.Hardswish(),
        )
        self.se = SqueezeExcite(12) if squeeze else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.project(self.se(self.depthwise(self.expand(x))))
        return self.head(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class Shared(nn.Module):
    """One layer used twice, one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.again = nn.Linear(10, 10)
        self.left = nn.Linear(10, 7)
        self.right = nn.Linear(10, 7)
        self.right.weight = self.left.weight
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x))))))
        return self.last(F.relu(self.left(x)) + F.relu(self.right(x)))


class TiedLSTM(nn.Module):
    """A language model whose decoder is its embedding, and which hands its state back."""

    def __init__(self, state=True):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.lstm = nn.LSTM(12, 12, num_layers=2, dropout=0.2)
        self.decoder = nn.Linear(12, 30)
        self.decoder.weight = self.embed.weight
        self.state = state

    def forward(self, x, state=None):
        out, state = self.lstm(self.embed(x), state)
        logits = self.decoder(out)
        return (logits, state) if self.state else logits


class LSTMLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.drop = nn.Dropout(0.3)
        self.lstm = nn.LSTM(8, 12, num_layers=2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(12, 30)

    def forward(self, x):
        out, _ = self.lstm(self.drop(self.embed(x)))
        return self.decoder(self.drop(out).reshape(-1, out.size(2)))


class GRUClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 10, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(20, 4)

    def forward(self, x):
        _, h = self.gru(x)
        return self.fc(torch.cat([h[-2], h[-1]], dim=1))


class Block(nn.Module):
    """A pre-norm transformer block whose attention is written by hand."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x):
        b, t, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.blocks = nn.ModuleList([Block(8, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, x):
        x = self.embed(x) + self.position[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TorchTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
        self.channels = nn.Sequential(nn.Linear(8, 20), nn.GLU(dim=-1), nn.Linear(10, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).permute(0, 2, 1)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        a, b = self.channels[0](self.norm2(x)).chunk(2, dim=-1)
        x = x + self.channels[2](a * torch.sigmoid(b))
        return self.head(x.mean(1))


class Highway(nn.Module):
    """A recurrent highway network: depth 2 at each step, the state made by the code."""

    def __init__(self, hidden=10):
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(5, 2 * hidden)
        self.steps = nn.ModuleList([nn.Linear(hidden, 2 * hidden) for _ in range(2)])
        self.out = nn.Linear(hidden, 4)

    def forward(self, x):
        s = torch.zeros(x.size(0), self.hidden)
        for t in range(x.size(1)):
            for depth, step in enumerate(self.steps):
                both = step(s) + self.input(x[:, t]) if depth == 0 else step(s)
                h, gate = both.chunk(2, dim=1)
                gate = torch.sigmoid(gate)
                s = torch.tanh(h) * gate + s * (1 - gate)
        return self.out(s)


class Functional(nn.Module):
    """Bare parameters and functions."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.u = nn.Parameter(torch.randn(8, 6) / 3)
        self.v = nn.Parameter(torch.randn(4, 6) / 3)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.w, padding=1)) * self.scale
        return F.linear(F.leaky_relu(x.mean((2, 3)) @ self.u), self.v)


def recurrent_highway(tied):
    return RHNLanguageModel(vocabulary=30, hidden=12, depth=3, tied=tied, spread=0.5)


def images(channels=3, size=8):
    return torch.linspace(-1, 1, 2 * channels * size * size).sin().reshape(2, channels, size, size)


def tokens(vocabulary, shape):
    return (torch.arange(shape[0] * shape[1]) * 7 % vocabulary).reshape(shape)


def series(width, shape=(3, 5)):
    return torch.linspace(-2, 2, shape[0] * shape[1] * width).cos().reshape(*shape, width)


ZOO = {
    "plain_cnn": (PlainCNN, lambda: images()),
    "lenet": (LeNet, lambda: images(1, 28)),
    "attribute_lenet": (AttributeLeNet, lambda: images(1, 28)),
    "resnet": (ResNet, lambda: images()),
    "pad_shortcut_resnet": (PadShortcutResNet, lambda: images()),
    "unet": (UNet, lambda: images(1, 8)),
    "densenet": (DenseNet, lambda: images()),
    "resnext": (ResNeXt, lambda: images()),
    "mobilenet": (MobileNet, lambda: images()),
    "squeeze_excite": (lambda: MobileNet(squeeze=True), lambda: images()),
    "shared": (Shared, lambda: series(6)[0]),
    "tied_lstm": (TiedLSTM, lambda: tokens(30, (5, 3))),
    "tied_lstm_without_state": (lambda: TiedLSTM(state=False), lambda: tokens(30, (5, 3))),
    "lstm_language_model": (LSTMLanguageModel, lambda: tokens(30, (3, 5))),
    "gru_classifier": (GRUClassifier, lambda: series(6)),
    "transformer": (Transformer, lambda: tokens(20, (2, 6))),
    "torch_transformer": (TorchTransformer, lambda: series(8)),
    "mixer": (Mixer, lambda: images()),
    "highway": (Highway, lambda: series(5)),
    "functional": (Functional, lambda: images()),
    "recurrent_highway": (lambda: recurrent_highway(tied=False), lambda: tokens(30, (3, 5))),
    "tied_recurrent_highway": (lambda: recurrent_highway(tied=True), lambda: tokens(30, (3, 5))),
}


class SpareHead(nn.Module):
    """A head that only training uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x):
        hidden = self.a(x)
        return (self.b(hidden), self.spare(hidden)) if self.training else self.b(hidden)
