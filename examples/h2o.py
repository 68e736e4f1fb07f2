"""Answers a question about a long text through a cache of 256 tokens: python examples/h2o.py"""

import pydoc_data.topics

from kvcompress import H2OCache, load_model


def main(budget: int = 256, new_tokens: int = 48) -> str:
    model, tokenizer = load_model()
    text = pydoc_data.topics.topics["for"] + "\nIn one sentence: what does the for statement do?"
    messages = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    cache = H2OCache(model, budget=budget)
    output = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)

    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)
    print(cache.memory())
    return answer


if __name__ == "__main__":
    main()
