"""llama.cpp's server with one API key and a tiny model of random weights that is made here: only its refusals matter.

    llama_server.py MODEL PORT KEY
"""
import pathlib, sys, time

import gguf
import numpy
import xllamacpp

WIDTH, HEADS, LAYERS, WORDS = 32, 2, 1, 64


def make(path):
    random = numpy.random.default_rng(7)
    tensor = lambda *shape: (random.standard_normal(shape) * 0.1).astype(numpy.float32)
    model = gguf.GGUFWriter(str(path), "llama")
    model.add_context_length(256)
    model.add_embedding_length(WIDTH)
    model.add_block_count(LAYERS)
    model.add_feed_forward_length(2 * WIDTH)
    model.add_head_count(HEADS)
    model.add_head_count_kv(HEADS)
    model.add_layer_norm_rms_eps(1e-5)
    model.add_rope_dimension_count(WIDTH // HEADS)
    # Three tokens of the vocabulary's own, a byte for every byte, and the rest made up.
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + [f"▁w{index}" for index in range(WORDS)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * WORDS
    model.add_tokenizer_model("llama")
    model.add_token_list(tokens)
    model.add_token_scores([0.0] * len(tokens))
    model.add_token_types(kinds)
    model.add_bos_token_id(1)
    model.add_eos_token_id(2)
    model.add_vocab_size(len(tokens))
    model.add_tensor("token_embd.weight", tensor(len(tokens), WIDTH))
    model.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    model.add_tensor("output.weight", tensor(len(tokens), WIDTH))
    for layer in range(LAYERS):
        for name, shape in [
            ("attn_q", (WIDTH, WIDTH)), ("attn_k", (WIDTH, WIDTH)), ("attn_v", (WIDTH, WIDTH)), ("attn_output", (WIDTH, WIDTH)),
            ("ffn_gate", (2 * WIDTH, WIDTH)), ("ffn_up", (2 * WIDTH, WIDTH)), ("ffn_down", (WIDTH, 2 * WIDTH)),
        ]:
            model.add_tensor(f"blk.{layer}.{name}.weight", tensor(*shape))
        for name in ["attn_norm", "ffn_norm"]:
            model.add_tensor(f"blk.{layer}.{name}.weight", numpy.ones(WIDTH, numpy.float32))
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.write_tensors_to_file()
    model.close()


path, port, key = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
make(path)
parameters = xllamacpp.CommonParams()
parameters.model.path = str(path)
parameters.hostnames = ["127.0.0.1"]
parameters.port = port
parameters.n_ctx = 256
parameters.n_parallel = 1
parameters.warmup = False
parameters.api_keys = [key]
parameters.chat_template = "chatml"
server = xllamacpp.Server(parameters)
print(f"listening at {server.listening_address}", flush=True)
time.sleep(600)
