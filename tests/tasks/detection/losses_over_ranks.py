"""Losses and gradients of a detector whose four images are split over the processes of a gloo group; a script.

Arguments: name of the detector, rank, number of ranks, file of the group, file to write. Rank r takes the images of
SHARES[number of ranks][r].
"""

import sys

import torch
from torch import distributed

from internimage import internimage_debug
from tasks.detection import DINO, CascadeRCNN, MaskRCNN

ALL = 10**6  # samplers take everything, so nothing is drawn
# Two images each, without a box on the first rank.
SHARES = {1: [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]]}
BOXES = [[], [], [(8, 8, 40, 40), (30, 5, 80, 45)], [(2, 20, 20, 44)]]
SIZE = (64, 96)


def detector(name):
    torch.manual_seed(0)
    options = {"rpn_samples": ALL, "roi_samples": ALL}
    if name == "dino":
        backbone = internimage_debug(out_indices=(1, 2, 3))
        small = {"num_queries": 20, "denoising_queries": 8, "dim": 64, "hidden_dim": 64, "num_layers": 2}
        return DINO(backbone, 3, label_noise=0, box_noise=0, **small)
    if name == "cascade":
        return CascadeRCNN(internimage_debug(), 3, **options)
    return MaskRCNN(internimage_debug(), 3, **options)


def target(boxes):
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.arange(len(boxes)) % 3
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels, "masks": masks}


def is_filled_up(key):
    return key.startswith("denoising") and key.endswith("class")


def main(name, rank, num_ranks, group, output):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=num_ranks)
    model = detector(name).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    images = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    mine = SHARES[num_ranks][rank]
    losses = parallel(images[mine], [SIZE] * len(mine), [target(BOXES[index]) for index in mine])
    # Denoising queries that fill up an image with fewer objects than its neighbours are told apart from objects too, as
    # in the authors' code: how many there are depends on which images share a process.
    sum(loss for key, loss in losses.items() if not is_filled_up(key)).backward()
    values = torch.stack([loss.detach() for loss in losses.values()])
    distributed.all_reduce(values)
    if rank == 0:
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        torch.save({"losses": dict(zip(losses, values / num_ranks, strict=True)), "gradients": gradients}, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
