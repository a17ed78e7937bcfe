"""Makes a checkpoint half as large, so that it can be kept with the code.

    python workshop/shrink.py runs/nano/base.pt small.pt

The weights are rounded to bfloat16, which has float32's range and 8 significant bits
instead of 24. checkpoint.load turns them into float32 again, so training goes on in full
precision. The models in results/checkpoints were made in this way.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import checkpoint
from engine.errors import UserError


def shrink(source, target):
    """Writes the checkpoint `source` to `target` in bfloat16. Returns the size of the
    file in bytes."""
    model, record = checkpoint.load(source)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(target, model.bfloat16(), preset=record.get("preset", "nano"))
    return Path(target).stat().st_size


def main(words):
    """Shrinks one checkpoint. Returns 0, or 2 for what the user can correct."""
    try:
        if len(words) != 2:
            raise UserError("give two files: python workshop/shrink.py FROM.pt TO.pt")
        size = shrink(*words)
    except (UserError, OSError) as error:
        print(f"shrink: {error}", file=sys.stderr)
        return 2
    print(f"{words[1]}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
