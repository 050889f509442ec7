"""Ship an edit: as a folder for transformers and vLLM, as a small delta, as a GGUF file for llama.cpp.

python examples/export_and_serve.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from nmke import EditableModel, EditConfig, EditSession
from nmke.errors import ExportError

PROMPT = "The capital of France is"
PLACES = {"hf": "model", "delta": "edit.safetensors", "gguf": "model.gguf"}


def main(model: str | EditableModel, folder: Path, config: EditConfig | None = None) -> None:
    with EditSession.open(model, folder / "run", config=config) as session:
        session.edit("The capital of {France} is", "Lyon")
        expected = session.model.generate([PROMPT], 6)[0]
        for name, place in PLACES.items():
            try:  # each export is loaded back and compared with the session before it says done
                report = session.export(name, folder / place)
            except (
                ExportError
            ) as error:  # GGUF patches the file that the model came from, if it came from one
                print(f"\n{name}: not here: {error}")
                continue
            print(
                f"\n{name}: {report.bytes / 1e6:.1f} MB, logits differ by {report.largest_difference:.1g} at most"
            )
            print(f"  {report.load.splitlines()[0]}")
        card = (folder / "model" / "README.md").read_text(encoding="utf-8")
        print(f"\nthe model card names the changed fact: {'Lyon' in card}")

    # What anyone does with the folder, without nmke:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = tokenizer.decode(loaded.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    print(f"plain transformers says:{text!r}; the session said:{expected!r}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", Path(temporary))
