"""Keeps a long text in 4 bits per element or fewer, and asks about it twice: python examples/gear.py"""

import pydoc_data.topics

from kvcompress import GEARCache, load_model


def main(new_tokens: int = 32) -> GEARCache:
    model, tokenizer = load_model()
    cache = GEARCache(model)
    messages = [{"role": "user", "content": pydoc_data.topics.topics["for"] + "\nIn one sentence: what is this about?"}]
    for question in ("And what may follow the loop's suite?", None):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        # the second turn feeds only what the cache has not seen
        output = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(answer)
        messages.append({"role": "assistant", "content": answer})
        if question is not None:
            messages.append({"role": "user", "content": question})
    print(cache.memory())
    return cache


if __name__ == "__main__":
    main()
