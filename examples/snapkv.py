"""Several questions about one text: the text is compressed once, and each question continues from a clone.

python examples/snapkv.py
"""

import pydoc_data.topics

import torch

from kvcompress import SnapKVCache, load_model

QUESTIONS = ["What follows the keyword for?", "When is the else clause executed?"]


def main(budget: int = 256, new_tokens: int = 32) -> list[str]:
    model, tokenizer = load_model()
    text = "<|im_start|>user\n" + pydoc_data.topics.topics["for"]
    context = tokenizer(text, return_tensors="pt").input_ids
    compressed = SnapKVCache(model, budget=budget)
    with torch.no_grad():
        model(context, cache=compressed, logits_to_keep=1)
    print(compressed.memory())

    answers = []
    for question in QUESTIONS:
        turn = tokenizer(f"\n{question}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids
        ids = torch.cat([context, turn], 1)
        output = model.generate(ids, cache=compressed.clone(), max_new_tokens=new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        print(f"{question}\n  {answers[-1]}")
    return answers


if __name__ == "__main__":
    main()
