"""The detector: a small anchor-free convolutional network, this project's own design.

Plain 3x3 and 1x1 convolutions with batch norm (folded into the convolution at export) and ReLU
(fused into it by ONNX Runtime): nothing that is slow on a CPU or awkward to quantise later.

    stem /2 -> /4 -> /8 (c3) -> /16 (c4) -> /32 (c5)      residual blocks at every step from /4
    c5 -> c4 -> c3 top-down, then c3 -> c4 -> c5 back up   sums, all NECK channels wide
    per level: one 3x3 and a 1x1 for the classes, the same for the box

A grid point predicts the distances to the box's left, top, right and bottom edges in units of its
stride (softplus, so never negative) and one score per class.
"""

import torch
from torch import nn
from torch.nn import functional as F

STRIDES = (8, 16, 32)
WIDTHS = (16, 24, 48, 80, 112)
NECK = 48


def conv(cin, cout, k=3, stride=1):
    return nn.Sequential(nn.Conv2d(cin, cout, k, stride, k // 2, bias=False),
                         nn.BatchNorm2d(cout, eps=1e-3), nn.ReLU())


class Block(nn.Module):
    """Two 3x3 convolutions through half the channels, added to what came in."""

    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(conv(c, c // 2), conv(c // 2, c))

    def forward(self, x):
        return x + self.body(x)


class Detector(nn.Module):
    def __init__(self, classes):
        super().__init__()
        w = WIDTHS
        self.classes = classes
        self.stem = nn.Sequential(conv(3, w[0], 3, 2), conv(w[0], w[1], 3, 2), Block(w[1]))
        self.c3 = nn.Sequential(conv(w[1], w[2], 3, 2), Block(w[2]), Block(w[2]))
        self.c4 = nn.Sequential(conv(w[2], w[3], 3, 2), Block(w[3]), Block(w[3]))
        self.c5 = nn.Sequential(conv(w[3], w[4], 3, 2), Block(w[4]), Block(w[4]))
        self.side = nn.ModuleList(conv(c, NECK, 1) for c in w[2:])
        self.down3, self.down4 = conv(NECK, NECK, 3, 2), conv(NECK, NECK, 3, 2)
        self.mix3, self.mix4 = conv(NECK, NECK), conv(NECK, NECK)
        self.box = nn.ModuleList(nn.Sequential(conv(NECK, NECK), nn.Conv2d(NECK, 4, 1))
                                 for _ in STRIDES)
        self.score = nn.ModuleList(nn.Sequential(conv(NECK, NECK), nn.Conv2d(NECK, classes, 1))
                                   for _ in STRIDES)
        for box, score in zip(self.box, self.score):
            # Start at boxes of about four strides, and at 1 % per class: nearly all points are
            # background, and starting at 50 % would spend the first epochs learning that.
            nn.init.constant_(box[-1].bias, 1.9)
            nn.init.constant_(score[-1].bias, -4.6)

    def forward(self, x):
        """Distances [B, 4, A] in strides and class logits [B, classes, A]."""
        c3 = self.c3(self.stem(x))
        c4 = self.c4(c3)
        c5 = self.c5(c4)
        p5 = self.side[2](c5)
        p4 = self.mix4(self.side[1](c4) + _double(p5))
        p3 = self.mix3(self.side[0](c3) + _double(p4))
        p4 = p4 + self.down3(p3)
        p5 = p5 + self.down4(p4)
        levels = (p3, p4, p5)
        boxes = [_rows(f(p)) for f, p in zip(self.box, levels)]
        scores = [_rows(f(p)) for f, p in zip(self.score, levels)]
        return F.softplus(torch.cat(boxes, 2)), torch.cat(scores, 2)


def _rows(x):
    # int(): the exporter then writes fixed shapes, not a handful of Shape and Slice nodes.
    n, c, h, w = (int(v) for v in x.shape)
    return x.reshape(n, c, h * w)


def _double(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def grid(height, width):
    """Centres [2, A] in input pixels and strides [1, A] of all grid points, level by level."""
    centres, strides = [], []
    for s in STRIDES:
        y, x = torch.meshgrid(torch.arange(height // s), torch.arange(width // s), indexing="ij")
        centres.append(torch.stack([x, y]).flatten(1).float() * s + s / 2)
        strides.append(torch.full((1, centres[-1].shape[1]), float(s)))
    return torch.cat(centres, 1), torch.cat(strides, 1)


def corners(distances, centres, strides):
    """Distances in strides -> x0, y0, x1, y1 in input pixels, [B, 4, A]."""
    d = distances * strides
    return torch.cat([centres - d[:, :2], centres + d[:, 2:]], 1)


class Deployed(nn.Module):
    """What is exported: decode in the graph, one output [1, 4 + classes, A] of (cx, cy, w, h, scores)."""

    def __init__(self, net, height, width):
        super().__init__()
        self.net = net
        centres, strides = grid(height, width)
        self.register_buffer("centres", centres[None])
        self.register_buffer("strides", strides[None])

    def forward(self, images):
        distances, logits = self.net(images)
        near, far = (distances * self.strides).split(2, 1)
        middle = self.centres + (far - near) * 0.5
        return torch.cat([middle, near + far, logits.sigmoid()], 1)
