"""Training on the CPU: which grid points answer for which object, the loss, and the loop."""

import math
import time

import numpy as np
import torch
from torch.nn import functional as F

from .net import Detector, corners, grid
from .render import VISIBLE_MIN

GREY = 114
# Longest side in input pixels that a level may answer for. Defects of every size belong to the
# finest grid: a scratch of 65 px was given to stride 16 once, where its 2 px line is hard to see,
# and got two loose boxes. Plates belong to the other two. The ranges overlap, so that a size in
# between is not forced onto the wrong level.
LEVEL_SIZES = {8: (0, 96), 16: (72, 190), 32: (130, 1e9)}
POINTS_PER_OBJECT = 8


def assign(boxes, logits, centres, strides, truth, classes):
    """Targets [B, C, A] for the scores and, per grid point, its box [B, 4, A].

    Candidates are the grid points near an object's middle on a level that suits its size. Of these
    the ones that already answer best (score times overlap) become responsible, and their target
    score is their overlap: so a confident score comes to mean a box that fits.
    `truth` [B, M, 5]: class, x0, y0, x1, y1; class -1 fills up.
    """
    cls = truth[..., 0].long().clamp(min=0)
    gt = truth[..., 1:]
    valid = truth[..., 0] >= 0
    middle = (gt[..., :2] + gt[..., 2:]) / 2
    size = gt[..., 2:] - gt[..., :2]
    off = (centres.T[None, None] - middle[:, :, None]).abs()                    # B M A 2
    s = strides[0]
    reach = torch.minimum(size[:, :, None] / 2, (2.5 * s)[None, None, :, None])
    # A scratch can be thinner than the grid: at least the nearest point must be allowed.
    reach = torch.maximum(reach, (0.75 * s)[None, None, :, None])
    longest = size.amax(-1)[..., None]
    low = torch.tensor([LEVEL_SIZES[int(v)][0] for v in s.tolist()])
    high = torch.tensor([LEVEL_SIZES[int(v)][1] for v in s.tolist()])
    candidate = (off < reach).all(-1) & (longest >= low) & (longest <= high) & valid[..., None]

    overlap = iou(gt[:, :, :, None], boxes[:, None])                            # B M A
    score = logits.sigmoid().gather(1, cls[..., None].expand(-1, -1, logits.shape[2]))
    # Power 5: a neighbour whose box fits a little worse is taught a much lower score, so that one
    # object gives one detection.
    fit = (score.sqrt() * overlap.clamp(min=1e-3) ** 5) * candidate
    best, at = fit.topk(POINTS_PER_OBJECT, 2)
    chosen = torch.zeros_like(fit).scatter_(2, at, (best > 0).float())
    # One object per point: the one it overlaps most.
    claimed = torch.where(chosen > 0, overlap + 1e-6, torch.zeros_like(overlap))
    owner = claimed.argmax(1)                                                   # B A
    chosen = chosen * F.one_hot(owner, fit.shape[1]).transpose(1, 2)
    fit = fit * chosen
    quality = fit / fit.amax(2, keepdim=True).clamp(min=1e-20) \
        * (overlap * chosen).amax(2, keepdim=True)
    quality = quality.gather(1, owner[:, None])[:, 0]                           # B A
    hot = F.one_hot(cls.gather(1, owner), classes).transpose(1, 2)
    box = gt.gather(1, owner[..., None].expand(-1, -1, 4)).transpose(1, 2)
    return hot * quality[:, None], box, quality


def iou(a, b):
    """Overlap of corner boxes along dimension 2 (or 1), broadcast."""
    d = 2 if a.dim() == 4 else 1
    ax0, ay0, ax1, ay1 = a.unbind(d)
    bx0, by0, bx1, by1 = b.unbind(d)
    w = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    h = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    inter = w * h
    return inter / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter + 1e-7)


def loss_of(net, images, truth, points):
    centres, strides = points
    with torch.autocast("cpu", torch.bfloat16):
        distances, logits = net(images)
    distances, logits = distances.float(), logits.float()
    boxes = corners(distances, centres[None], strides[None])
    with torch.no_grad():
        target, goal, weight = assign(boxes, logits, centres, strides, truth, net.classes)
    total = weight.sum().clamp(min=1)
    score = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / total
    # Overlap plus the distance of the middles against the joint box's diagonal: where boxes do not
    # overlap at all the second part still says which way to go.
    wide = torch.maximum(boxes[:, 2:], goal[:, 2:]) - torch.minimum(boxes[:, :2], goal[:, :2])
    apart = (boxes[:, :2] + boxes[:, 2:] - goal[:, :2] - goal[:, 2:]) / 2
    off = (apart**2).sum(1) / ((wide**2).sum(1) + 1e-7)
    # And the edges themselves in strides, gently: overlap alone is slow on the last pixel.
    edge = (boxes - goal).abs().mean(1) / strides
    box = ((1 - iou(boxes, goal) + off + 0.1 * edge) * weight).sum() / total
    return score + 4 * box, score.detach(), box.detach()


class Batches:
    """Random batches from the drawn strips, placed on a grey canvas as a letterbox would.

    `classes` limits the labels: what a network does not know is in its pictures, unlabelled.
    `vary` off: the pictures as they are, neither flipped nor moved nor recoloured.
    """

    def __init__(self, strips, labels, classes, seed, vary):
        self.strips, self.labels, self.classes, self.vary = strips, labels, classes, vary
        self.rng = np.random.default_rng(seed)
        self.order = []

    def take(self, count, height):
        rng = self.rng
        if len(self.order) < count:
            self.order = list(rng.permutation(len(self.strips)))
        picks = [self.order.pop() for _ in range(count)]
        _, h, w, _ = self.strips.shape
        canvas = np.full((count, height, w, 3), GREY, np.uint8)
        truth = []
        for i, pick in enumerate(picks):
            image = self.strips[pick]
            boxes = self.labels[pick].copy()
            boxes[:, 1:] *= w
            if self.vary and rng.random() < 0.5:
                image = image[:, ::-1]
                boxes[:, [1, 3]] = w - boxes[:, [3, 1]]
            if self.vary and rng.random() < 0.5:
                image = image[::-1]
                boxes[:, [2, 4]] = h - boxes[:, [4, 2]]
            # Half the time where a 16:9 camera's letterbox puts it, else anywhere it fits, moved
            # sideways too: otherwise the network would learn where on the canvas things can be.
            dx, dy = 0, (height - h) // 2
            if self.vary and rng.random() < 0.5:
                dx, dy = int(rng.integers(-28, 29)), int(rng.integers(0, height - h + 1))
            x0, x1 = max(dx, 0), min(w + dx, w)
            canvas[i, dy:dy + h, x0:x1] = image[:, x0 - dx:x1 - dx]
            full = (boxes[:, 3] - boxes[:, 1])
            boxes[:, 1::2] = np.clip(boxes[:, 1::2] + dx, 0, w)
            boxes[:, 2::2] += dy
            keep = (boxes[:, 3] - boxes[:, 1] > VISIBLE_MIN * full) & (boxes[:, 0] < self.classes)
            truth.append(boxes[keep])
        most = max(1, max(len(t) for t in truth))
        packed = torch.full((count, most, 5), -1.0)
        for i, t in enumerate(truth):
            packed[i, :len(t)] = torch.from_numpy(t)
        images = torch.from_numpy(canvas).permute(0, 3, 1, 2).float().div_(255)
        return (self._recolour(images) if self.vary else images), packed

    def _recolour(self, images):
        """Gain, offset and colour of a whole picture, as another camera's exposure would."""
        n, rng = len(images), self.rng
        def draw(lo, hi, channels=1):
            return torch.from_numpy(rng.uniform(lo, hi, (n, channels, 1, 1)).astype(np.float32))
        grey = (images == GREY / 255).all(1, keepdim=True)
        out = images * draw(0.82, 1.2) * draw(0.95, 1.05, 3) + draw(-0.04, 0.04)
        return torch.where(grey, images, out.clamp(0, 1))


def train(strips, labels, classes, seed, steps, canvas, threads=1, batch=8, peak=2e-3,
          vary=True, snapshot=None):
    """Train one network. `canvas`: (height for most of the run, height of the export).

    One thread by default: the sums' order, and so the weights, depend on the number of threads, and
    two trainings side by side are faster than one with two threads. `snapshot` gets the running
    mean every 250 steps.
    Most steps see a canvas with little grey, because grey costs time and teaches nothing; the last
    eighth sees the full one.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    net = Detector(classes)
    mean = Detector(classes)
    mean.load_state_dict(net.state_dict())
    batches = Batches(strips, labels, classes, seed, vary)
    decay = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02},
                                   {"params": plain, "weight_decay": 0.0}], lr=peak)
    points = {h: grid(h, strips.shape[2]) for h in set(canvas)}
    start, sums = time.time(), []
    for step in range(steps):
        height = canvas[0] if step < steps * 7 / 8 else canvas[1]
        rate = peak * min((step + 1) / 150, 0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5
        for group in optimiser.param_groups:
            group["lr"] = rate
        images, truth = batches.take(batch, height)
        loss, score, box = loss_of(net, images, truth, points[height])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimiser.step()
        # A running mean of the weights: worth several epochs of a short training.
        keep = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for a, b in zip(mean.state_dict().values(), net.state_dict().values()):
                if a.dtype.is_floating_point:
                    a.lerp_(b, 1 - keep)
                else:
                    a.copy_(b)
        sums.append((score.item(), box.item()))
        if (step + 1) % 50 == 0:
            s, b = np.mean(sums[-50:], 0)
            print(f"step {step + 1}/{steps}  score {s:.3f}  box {b:.3f}  "
                  f"{(time.time() - start) / 60:.1f} min", flush=True)
        if snapshot and (step + 1) % 250 == 0:
            snapshot(mean)
    return mean.eval()
