"""He et al.'s ResNet-20 for 32 x 32 images, as a transformers image classifier (load it with trust_remote_code)."""

from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class ResNet20Config(PreTrainedConfig):
    model_type = "resnet20"

    def __init__(self, image_size=32, num_channels=3, blocks=3, widths=(16, 32, 64), **kwargs):
        self.image_size, self.num_channels, self.blocks, self.widths = image_size, num_channels, blocks, list(widths)
        super().__init__(**kwargs)


class Block(nn.Module):
    """Two 3 x 3 convolutions; the shortcut takes every second pixel and pads channels with zeros where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        first, middle, last = config.widths
        self.conv1 = nn.Conv2d(config.num_channels, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = stage(first, first, config.blocks, 1)
        self.layer2 = stage(first, middle, config.blocks, 2)
        self.layer3 = stage(middle, last, config.blocks, 2)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def stage(inputs, outputs, blocks, stride):
    return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


class ResNet20ForImageClassification(PreTrainedModel):
    config_class = ResNet20Config
    base_model_prefix = "net"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.net = Net(config)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.classifier(self.net(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
