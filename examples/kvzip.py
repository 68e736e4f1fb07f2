"""Questions that nobody had asked when the text was compressed: it is read twice, half of its tokens stay, and each
question continues from a clone.

python examples/kvzip.py
"""

import torch

from kvcompress import DenseCache, KVzipCache, load_model

TEXT = """
The archive of the observatory is kept in the east wing. Anna Lindqvist has been its keeper since 1987. The dome was
repaired after the storm of 1994, and its new shutters came from Trieste. Visitors are let in on Thursdays, and a
ticket costs nine crowns. The large telescope is called Halvard; its mirror weighs 412 kilograms and was ground by two
brothers from Bergen. In winter the stove is lit at four in the afternoon. The cat of the house is called Pluto, and it
sleeps on the star charts, which are stored in the green cabinet beside the door. The librarian speaks five languages.
The path from the village takes forty minutes on foot, and the last part of it is steep. Halfway up stands a bench that
the schoolmaster built for his wife. From there one sees the lake, the church and, on clear days, the lighthouse. The
observatory was founded by a merchant of wool who had no children. He left it his books, his house and a sum of money
that was soon spent. Since then the town pays for the coal, and the university for the instruments. A new clock was
bought last year. It hangs in the hall above the map of the moon, and it is two minutes slow. Nobody has complained.
"""
QUESTIONS = {
    "What is the large telescope called?": "The large telescope is called",
    "On which day are visitors let in?": "Visitors are let in on",
    "What is the name of the cat?": "The cat of the house is called",
}


def main(budget: int | float = 0.5, new_tokens: int = 4) -> dict[str, list[str]]:
    model, tokenizer = load_model()
    context = tokenizer("<|im_start|>user\n" + TEXT.replace("\n", " "), return_tensors="pt").input_ids
    answers: dict[str, list[str]] = {question: [] for question in QUESTIONS}
    for cache in (DenseCache(model), KVzipCache(model, budget=budget)):
        with torch.no_grad():
            model(context, cache=cache, logits_to_keep=1)
        print(cache.memory())
        for question, beginning in QUESTIONS.items():
            turn = f"\n{question}<|im_end|>\n<|im_start|>assistant\n{beginning}"
            ids = torch.cat([context, tokenizer(turn, return_tensors="pt").input_ids], 1)
            output = model.generate(ids, cache=cache.clone(), max_new_tokens=new_tokens, do_sample=False)
            answers[question].append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    for question, (full, compressed) in answers.items():
        print(f"{question}\n  full cache: {full}\n  {budget:.0%} of it: {compressed}")
    return answers


if __name__ == "__main__":
    main()
