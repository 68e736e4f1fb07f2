"""A conversation of any length in constant memory: the first tokens and a recent window.

python examples/streaming.py
"""

from kvcompress import StreamingLLMCache, load_model

TURNS = ["My name is Ada. Say hello to me.", "What is the capital of France?", "And of Italy?"]


def main(budget: int = 128, new_tokens: int = 32) -> StreamingLLMCache:
    model, tokenizer = load_model()
    cache = StreamingLLMCache(model, budget=budget)
    messages: list[dict[str, str]] = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"{turn}\n  {answer}\n  {cache.memory().total_bytes / 2**20:.1f} MiB")
    return cache


if __name__ == "__main__":
    main()
