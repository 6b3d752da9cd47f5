"""The text to copy that takes a choice into fine-tuning of one's own."""

from __future__ import annotations

from vlmlayers.placement import describe_blocks, module_pattern
from vlmlayers.report.numbers import Answer


def handover_text(answer: Answer) -> str:
    """Return Python that applies the choice with peft or by freezing, and what it stands for.

    Where the run knows the names of the model's modules, peft's `target_modules` stand there too,
    so that the text serves without this package.
    """
    counted = ", ".join(
        f"{tower} {describe_blocks(blocks)}" for tower, blocks in answer.choice.zero_based.items()
    )
    open_ones = any(
        set(answer.choice.open(tower)) & set(answer.choice.blocks(tower))
        for tower in answer.choice.zero_based
    )
    firm = ", ".join(
        f"{tower} {describe_blocks(block - 1 for block in answer.choice.firm(tower))}"
        for tower in answer.choice.zero_based
    )
    lines = [
        "import peft, torch, vlmlayers as vl",
        "",
        "# clip: your model of open_clip or transformers",
        'choice = vl.LayerChoice.load("choice.json")',
        "lora = peft.get_peft_model(clip, choice.to_peft(clip, r=8))  # LoRA in the chosen blocks",
        "",
        "choice.freeze(clip)  # or train the chosen blocks themselves, and nothing else",
        "optimiser = torch.optim.AdamW(choice.parameter_groups(clip, lr=1e-5))",
        "",
        f"# blocks counted from 0, as modules are: {counted}",
        *([f"# open blocks included; the firm ones alone: {firm}"] if open_ones else []),
    ]
    towers = answer.provenance.get("model", {}).get("towers", {})
    patterns = [
        module_pattern((known["modules"][block] for block in blocks), known["layers"])
        for tower, blocks in answer.choice.zero_based.items()
        if blocks and (known := towers.get(tower, {})).get("modules")
    ]
    if patterns:
        lines += ["target_modules = (", *(f'    r"{p}|"' for p in patterns[:-1])]
        lines += [f'    r"{patterns[-1]}"', ")"]
    return "\n".join(lines)
