"""A question that was unknown when the text was read: everything is kept, most of it off the device, and little read.

python examples/shadowkv.py
"""

import pydoc_data.topics

from kvcompress import ShadowKVCache, load_model


def main(budget: int = 128, new_tokens: int = 32) -> ShadowKVCache:
    model, tokenizer = load_model()
    text = pydoc_data.topics.topics["try"]
    cache = ShadowKVCache(model, budget=budget)  # host="mmap:/a/folder" keeps the values in a file

    conversation = f"<|im_start|>user\n{text}\nWhat does a finally clause do?<|im_end|>\n<|im_start|>assistant\n"
    for question in ("", "<|im_end|>\n<|im_start|>user\nAnd an else clause?<|im_end|>\n<|im_start|>assistant\n"):
        conversation += question
        ids = tokenizer(conversation, return_tensors="pt").input_ids
        output = model.generate(ids, cache=cache, max_new_tokens=new_tokens, do_sample=False)
        conversation = tokenizer.decode(output[0])
        print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    print(cache.memory())  # bytes on the device, on the host, and moved per step
    return cache


if __name__ == "__main__":
    main()
