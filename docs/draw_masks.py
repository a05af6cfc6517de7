"""Draws the pictures of docs/masks.md into docs/masks/: `python docs/draw_masks.py`."""

from pathlib import Path

import torch

from magi_attention.mask import Mask

FOLDER = Path(__file__).parent / "masks"

PICTURES = {
    "full": Mask.full(12),
    "causal": Mask.causal(12),
    "varlen": Mask.varlen([0, 3, 7, 12]),
    "varlen_window": Mask.varlen([0, 5, 12], window=(2, 0), global_tokens=1),
    "sliding_window": Mask.sliding_window(12, 2, 1),
    "block_causal": Mask.block_causal(12, 3, cu_seqlens=[0, 7, 12]),
    "prefix_lm": Mask.prefix_lm(12, 4),
    "shared_question": Mask.shared_question(4, [3, 2, 3]),
    "tree": Mask.tree([-1, 0, 1, 1, 0, 4, 4], [2, 2, 2, 1, 2, 1, 2]),
    "from_slices": Mask.from_slices(
        [[0, 4], [4, 7], [7, 10], [10, 12]],
        [[0, 6], [0, 6], [3, 9], [6, 12]],
        ["causal", "inv_causal", "bi_causal", "full"],
    ),
    "from_bands": Mask.from_bands([[0, 12], [4, 12]], [[0, 12], [0, 6]], [(-1, 2), (None, -4)]),
    "documents": Mask.varlen(torch.tensor([0, 90, 210, 240, 420, 430, 700, 760, 880, 1000]) * 1000),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, mask in PICTURES.items():
        figure = mask.draw()
        figure.set_size_inches(2.6, 2.6)
        axes = figure.axes[0]
        axes.title.set_fontsize(8)
        axes.tick_params(labelsize=6)
        axes.set(xlabel="", ylabel="")
        figure.savefig(FOLDER / f"{name}.png", dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
