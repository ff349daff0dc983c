"""Networks written out in PyTorch, under the names of torchvision, timm and the published code, with random weights."""

import torch
from torch import nn


class Block(nn.Module):
    """torchvision's bottleneck."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """``stages`` gives the feature maps after every stage; with a classifier it has all of torchvision's names."""

    def __init__(self, classes=0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            layer = []
            for i in range(blocks):
                layer.append(Block(channels, width, 2 if stage and not i else 1))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        if classes:
            self.fc = nn.Linear(channels, classes)

    def stages(self, x):
        maps = [self.pool(torch.relu(self.bn1(self.conv1(x))))]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps

    def forward(self, x):
        return self.stages(x)[-1]


class Published(nn.Module):
    """A network as the published IDML code keeps it: everything under ``model``, the classifier still there."""

    def __init__(self, dim=16):
        super().__init__()
        self.model = random_weights(ResNet50(classes=10))
        self.model.embedding = nn.Linear(2048, dim)
        self.model.uncertainty = nn.Linear(2048, dim)

    def forward(self, x):
        maps = self.model(x)
        pooled = maps.mean((2, 3)) + maps.amax((2, 3))
        return nn.functional.normalize(self.model.embedding(pooled)), self.model.uncertainty(pooled)


class PyramidBlock(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * width)

    def forward(self, x):
        y = torch.relu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn4(self.conv3(torch.relu(self.bn3(self.conv2(y)))))
        if self.stride == 2:
            x = nn.functional.avg_pool2d(x, 2, 2, ceil_mode=True)
        y[:, : x.shape[1]] += x
        return y


class PyramidNet11(nn.Module):
    """One bottleneck in each of three stages, alpha 12: widths 20, 24 and 28."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(PyramidBlock(16, 20, 1))
        self.layer2 = nn.Sequential(PyramidBlock(80, 24, 2))
        self.layer3 = nn.Sequential(PyramidBlock(96, 28, 2))
        self.bn_final = nn.BatchNorm2d(112)

    def forward(self, x):
        return torch.relu(self.bn_final(self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, d))


class TransformerBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """timm's and DINO's names; 384 wide, 16-pixel patches as ViT-S/16, with the depth asked for."""

    def __init__(self, depth=12, width=384, heads=6, patch=16, size=224):
        super().__init__()
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 1 + (size // patch) ** 2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def random_weights(net, seed=0):
    """BatchNorm statistics other than 0 and 1; small scales keep the activations of a random net in range."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def random_resnet50():
    torch.manual_seed(0)
    return random_weights(ResNet50())


def tensors_of(net):
    """A net's tensors as ``pretrained.read`` gives those of a file."""
    from idml_jax.training.weights import Tensors

    named = {name: value.detach().numpy() for name, value in net.state_dict().items()}
    left_out = tuple(n for n in named if n.startswith(("fc.", "head.")) or n.endswith("num_batches_tracked"))
    return Tensors({n: v for n, v in named.items() if n not in left_out}, left_out, torch=True)
