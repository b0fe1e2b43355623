"""What an assistant can do, measured on photos and drawn scenes it was not trained on.

    python benchmarks/quality.py --captions flickr8k-dev.jsonl --caption-images flickr8k-dev.tar \
        --scenes scenes-test --chat chat-dev.json

Each data set may be left out. The last line is one line of JSON, figure names to numbers.
"""

import argparse
import json
from pathlib import Path

import torch

from basalt.assistants import load_assistant
from basalt.eval.local import caption_scores, perplexity_ratio, scene_scores
from basalt.model.assistant import LocalAssistant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/basalt-tiny"))
    parser.add_argument("--base-lm", type=Path, default=Path("var/base/smollm2-135m-instruct"))
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--caption-images", type=Path)
    parser.add_argument("--scenes", type=Path)
    parser.add_argument("--chat", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base LM")
    parser.add_argument("--answers", type=Path, help="write every scene question with its answer here, as JSON lines")
    parser.add_argument("--beams", type=int, default=1, help="of the captions; 1 is greedy")
    parser.add_argument("--limit", type=int, help="at most so many photos, scene questions and conversations")
    parser.add_argument("--quick", action="store_true", help="the same as --limit 32")
    options = parser.parse_args()
    limit = 32 if options.quick else options.limit
    assistant = LocalAssistant(load_assistant(options.model), options.base_lm, getattr(torch, options.dtype))
    figures: dict[str, float] = {}

    def tell(name: str, value: float, more: str = "") -> None:
        figures[name] = round(value, 4)
        print(f"{name:28} {value:8.4f} {more}", flush=True)

    capital = assistant.answer([([{"role": "user", "content": "What is the capital of France?"}], [])])[0]
    tell("says_paris", float("Paris" in capital), capital)
    if options.chat:
        tell("chat_perplexity_ratio", perplexity_ratio(assistant, options.chat, limit=limit))
    if options.captions and options.caption_images:
        found = caption_scores(assistant, options.captions, options.caption_images, beams=options.beams, limit=limit)
        for name, value in found.items():
            tell(name, value)
    if options.scenes:
        scores, answered = scene_scores(assistant, options.scenes, limit=limit)
        for name, of in scores.items():
            tell(f"scenes_{name}", of.accuracy, f"[{of.low:.3f}, {of.high:.3f}] of {of.count}")
        if options.answers:
            lines = [json.dumps({"id": row["id"], "gold": row["gold"], "answer": answer}) for row, answer in answered]
            options.answers.write_text("\n".join(lines) + "\n")
    given = {"chat": options.chat, "captions": options.captions and options.caption_images, "scenes": options.scenes}
    left_out = [name for name, data in given.items() if not data]
    if left_out:
        print(f"not measured, for want of data: {', '.join(left_out)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
