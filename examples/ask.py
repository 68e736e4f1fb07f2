"""Questions about a text that is read once, each answered from a fork of what is kept of it: python examples/ask.py"""

from kvcompress import ask, load_model
from kvcompress.asking import Answers

TEXT = """
The archive of the observatory is kept in the east wing. Anna Lindqvist has been its keeper since 1987. The dome was
repaired after the storm of 1994, and its new shutters came from Trieste. Visitors are let in on Thursdays, and a
ticket costs nine crowns. The large telescope is called Halvard; its mirror weighs 412 kilograms and was ground by two
brothers from Bergen. In winter the stove is lit at four in the afternoon. The cat of the house is called Pluto, and it
sleeps on the star charts, which are stored in the green cabinet beside the door. The librarian speaks five languages.
"""
QUESTIONS = ["What is the large telescope called?", "Who is the keeper of the archive?", "What is the cat called?"]


def main(method: str = "kvzip", budget: int | float = 0.6, new_tokens: int = 24) -> Answers:
    model, tokenizer = load_model()
    found = ask(model, tokenizer, TEXT, QUESTIONS, method, budget=budget, max_new_tokens=new_tokens)
    for question, answer in zip(QUESTIONS, found.answers, strict=True):
        print(f"{question}\n  {answer}")
    print(found.memory)
    return found


if __name__ == "__main__":
    main()
