/* The C interface for Python. cffi reads everything between the two markers.
 * shim.cpp implements it over llama.h and ggml.h, so a libllama with other
 * headers fails to compile instead of failing at run time.
 *
 * No C++ exception crosses this interface. An assertion in libllama on the
 * calling thread becomes a failed call. A failed call returns the documented
 * value, and erl_last_error() returns its reason. */
#ifndef ERLLAMA_SHIM_H
#define ERLLAMA_SHIM_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
/* cffi: begin */

struct llama_model;
struct llama_vocab;
struct llama_sampler;
struct llama_adapter_lora;
struct gguf_context;
typedef struct erl_load erl_load;       /* progress and cancellation of one model load */
typedef struct erl_context erl_context; /* a llama_context with its batch and abort flag */

/* Results of failed calls. Results of libllama are greater, except INT32_MIN (an overflow). */
#define ERL_ASSERTION -2147483646
#define ERL_EXCEPTION -2147483647

/* A metadata entry that replaces the file's. */
typedef struct {
    const char *key;
    int32_t type; /* numbers of llama.h: 0 int, 1 float, 2 bool, 3 text */
    int64_t integer; /* an int; 0 or 1 for a bool */
    double real;
    const char *text; /* at most 127 bytes */
} erl_override;

typedef struct {
    int32_t n_gpu_layers; /* < 0: all */
    int32_t split_mode;   /* numbers of llama.h: 0 none, 1 layer, 2 row */
    int32_t main_gpu;     /* with split_mode 0: index in `devices` */
    int8_t mmap;
    int8_t mlock;
    int8_t vocab_only;
    const int32_t *devices; /* numbers of the devices for layers */
    int32_t n_devices;      /* < 0: libllama's choice */
    const float *tensor_split; /* n_devices shares, or NULL */
    const erl_override *overrides;
    int32_t n_overrides;
} erl_model_options;

typedef struct {
    uint32_t n_ctx;
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    int32_t n_threads;
    int32_t n_threads_batch;
    int32_t flash_attn; /* -1 auto, 0 off, 1 on */
    int32_t type_k;     /* ggml types, see erl_ggml_type() */
    int32_t type_v;
    float rope_freq_base;  /* 0: the model's */
    float rope_freq_scale; /* 0: the model's */
    int32_t rope_scaling;  /* numbers of llama.h: -1 the model's, 0 none, 1 linear, 2 yarn */
    float yarn_ext_factor; /* each of these four < 0: the model's */
    float yarn_attn_factor;
    float yarn_beta_fast;
    float yarn_beta_slow;
    uint32_t yarn_orig_ctx; /* 0: the model's */
    int8_t offload_kqv;
    int8_t swa_full;
    int8_t kv_unified;
    int8_t embeddings; /* rows are embeddings */
    int32_t pooling;   /* number of llama.h; -1: the model's */
} erl_context_options;

typedef struct {
    const char *name;
    const char *description;
    const char *id; /* id of the hardware, such as a PCI address, or NULL */
    const char *server; /* the RPC server that has the device, or NULL */
    int32_t kind;   /* numbers of ggml-backend.h: 0 cpu, 1 gpu, 2 igpu, 3 accel */
    uint64_t free_bytes;
    uint64_t total_bytes;
} erl_device;

/* The results of a computation that did not fail. */
typedef struct {
    int32_t n_rows;      /* rows with logits */
    const float *logits; /* these rows, in the order of the batch; NULL if there is none */
    int64_t elapsed_ns;  /* of libllama's part */
    int64_t cpu_ns;      /* of CPU time of the calling thread, in that part */
} erl_computed;

typedef struct {
    int32_t n_ctx_train;
    int32_t n_embd;
    int32_t n_embd_out; /* size of an embedding */
    int32_t n_cls_out;  /* number of scores of a ranking */
    int32_t n_layer;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_swa;
    int32_t rope_type;
    uint64_t n_bytes;
    uint64_t n_params;
    int8_t recurrent;
    int8_t hybrid;
    int8_t diffusion;
    int8_t has_encoder;
    int8_t has_decoder;
} erl_model_shape;

typedef struct {
    int32_t n_tokens;
    int32_t type;
    int32_t bos, eos, eot, nl, pad, sep, mask;
    int32_t fim_pre, fim_suf, fim_mid;
    int8_t add_bos;
    int8_t add_eos;
    int8_t add_sep;
} erl_vocab_shape;

/* Reason of the calling thread's last failed call. Valid until the thread's next call. */
const char *erl_last_error(void);

/* Start backends, log and assertion handlers, once per process. Returns 0, or < 0. */
int32_t erl_init(void);
const char *erl_system_info(void);
int32_t erl_state_seq_version(void);
int32_t erl_max_sequences(void);
int32_t erl_n_devices(void);
int32_t erl_device_of(int32_t i, erl_device *out);

/* Add the devices of an RPC server, such as "127.0.0.1:50052", after all others; at most once. If it was added before,
 * connect again if the connection was lost. Returns 0; 1 if this libllama has no RPC; 2 if the server cannot be used,
 * with a reason in erl_last_error. */
int32_t erl_rpc_add(const char *server);
/* Number of the working connection to a server; 0 if there is none. What a server holds ends with the connection. */
int64_t erl_rpc_connection(const char *server);

/* Take one line of libllama's log. Returns its length, or -1 if there is none.
 * `level` is a number of ggml: 1 debug, 2 info, 3 warning, 4 error. */
int32_t erl_log_pending(void);
int32_t erl_log_next(int32_t *level, char *buffer, int32_t size);

/* Number of a ggml type name such as "f16" or "q8_0", or -1. */
int32_t erl_ggml_type(const char *name);
int64_t erl_ggml_block_size(int32_t type); /* elements per quantization block */
int64_t erl_ggml_type_bytes(int32_t type); /* bytes per quantization block */

/* Models. erl_model_load returns NULL if it failed or was cancelled. */
erl_load *erl_load_new(void);
float erl_load_progress(const erl_load *load);
void erl_load_cancel(erl_load *load);
/* After the load: libllama's log of it, and the key of the first override without effect, or NULL. */
const char *erl_load_log(const erl_load *load);
const char *erl_load_unused(const erl_load *load);
void erl_load_free(erl_load *load);
struct llama_model *erl_model_load(const char *path, const erl_model_options *options, erl_load *load);
void erl_model_free(struct llama_model *model);
int32_t erl_model_shape_of(struct llama_model *model, erl_model_shape *out);
int32_t erl_model_desc(struct llama_model *model, char *buffer, size_t size);
const char *erl_model_file_type(struct llama_model *model); /* such as "Q4_K - Medium" */
int32_t erl_model_meta_count(struct llama_model *model);
int32_t erl_model_meta_key(struct llama_model *model, int32_t i, char *buffer, size_t size);
int32_t erl_model_meta_value(struct llama_model *model, int32_t i, char *buffer, size_t size);
const char *erl_model_chat_template(struct llama_model *model, const char *name);

/* A vocabulary belongs to its model. */
const struct llama_vocab *erl_vocab(struct llama_model *model);
int32_t erl_vocab_shape_of(const struct llama_vocab *vocab, erl_vocab_shape *out);
const char *erl_vocab_text(const struct llama_vocab *vocab, int32_t token);
int32_t erl_vocab_attributes(const struct llama_vocab *vocab, int32_t *attributes, int8_t *is_eog, int32_t n);
/* Token calls return a length. A negative one is the length that they need. */
int32_t erl_tokenize(const struct llama_vocab *vocab, const char *text, int32_t n_text,
                     int32_t *tokens, int32_t n_max, int32_t add_special, int32_t parse_special);
int32_t erl_token_piece(const struct llama_vocab *vocab, int32_t token, char *buffer, int32_t size, int32_t special);
/* Concatenated pieces of the first n tokens; empty for control tokens. Token i ends at ends[i]. Returns the number of
 * bytes of all. If that exceeds `size`, the buffer is not valid. */
int64_t erl_vocab_pieces(const struct llama_vocab *vocab, char *buffer, int64_t size, uint32_t *ends, int32_t n);
/* Concatenated pieces. strip_space removes one space at the start of the text. */
int32_t erl_detokenize(const struct llama_vocab *vocab, const int32_t *tokens, int32_t n_tokens,
                       char *buffer, int32_t size, int32_t strip_space, int32_t special);

/* Contexts. */
erl_context *erl_context_new(struct llama_model *model, const erl_context_options *options);
void erl_context_free(erl_context *context);
void erl_context_abort(erl_context *context, int32_t abort);
/* Sets the number of threads of later computations, 1 to the greater number of the context's options. */
int32_t erl_context_threads(erl_context *context, int32_t n_threads);
uint32_t erl_context_n_ctx(const erl_context *context);
uint32_t erl_context_n_batch(const erl_context *context);
uint32_t erl_context_n_ubatch(const erl_context *context);
const char *erl_context_log(const erl_context *context); /* libllama's log of the creation */
/* Returns 0 done; 1 too few free cells; 2 aborted; 3 refused, with a reason in erl_last_error; 4 more rows with logits
 * than max_rows, before anything was computed; 5 done, too, but with lines in the log, or without exactly n_rows rows;
 * < 0 failed. Rows whose `output` is not 0 have logits. */
int32_t erl_decode(erl_context *context, int32_t n, const int32_t *tokens, const int32_t *positions,
                   const int32_t *sequences, const int8_t *output, int32_t n_rows, int32_t max_rows,
                   erl_computed *computed);
/* Whether sequences persist between decodes. Models that only encode have no memory. */
int32_t erl_context_has_memory(const erl_context *context);
/* For a context with `embeddings`: drops all sequences, computes the batch, which has the complete sequences 0 to
 * n_sequences - 1, and writes rows of `width` numbers: one per sequence, or without pooling one per token.
 * Returns the results of erl_decode, except 4 and 5. */
int32_t erl_embed(erl_context *context, int32_t n, const int32_t *tokens, const int32_t *positions,
                  const int32_t *sequences, int32_t n_sequences, float *rows, int32_t width,
                  erl_computed *computed);

/* The largest numbers of rows. erl_argmax writes the position of the largest number of each row, the first of equal ones;
 * -1 if it is not finite, or a number is NaN. erl_top_k writes, for each row, the positions of the k largest numbers and
 * the numbers: largest first, ties by rising position; 1 <= k <= n. A NaN counts as the largest: of a row with one, only
 * the first result is defined. Both return 0, or < 0. */
int32_t erl_argmax(const float *rows, int32_t n_rows, int32_t n, int32_t *positions);
int32_t erl_top_k(const float *rows, int32_t n_rows, int32_t n, int32_t k, intptr_t *positions, float *numbers);

/* An adapter (LoRA) belongs to its model. Load and free it while no other thread creates a context of the model or
 * computes in one. erl_adapter_load returns NULL if it failed. erl_adapter_free: `model` is the model of the load, and no
 * context may hold the adapter any more. */
struct llama_adapter_lora *erl_adapter_load(struct llama_model *model, const char *path);
void erl_adapter_free(struct llama_model *model, struct llama_adapter_lora *adapter);
/* Set the n adapters of the next decodes. They are summed in this order, as far as libllama keeps it: for two. */
int32_t erl_context_adapters(erl_context *context, struct llama_adapter_lora **adapters, float *scales, int32_t n);

/* Memory: positions [p0, p1). p1 < 0 means to the end. */
int32_t erl_memory_clear(erl_context *context, int32_t zero);
int32_t erl_memory_cut(erl_context *context, int32_t sequence, int32_t p0, int32_t p1); /* 1 done, 0 refused */
int32_t erl_memory_copy(erl_context *context, int32_t source, int32_t target, int32_t p0, int32_t p1);
int32_t erl_memory_first(erl_context *context, int32_t sequence);
int32_t erl_memory_last(erl_context *context, int32_t sequence);
int64_t erl_state_size(erl_context *context, int32_t sequence);
int64_t erl_state_get(erl_context *context, int32_t sequence, uint8_t *buffer, size_t size);
int64_t erl_state_set(erl_context *context, int32_t sequence, const uint8_t *buffer, size_t size);
/* Sets the n states of consecutive positions as one state. Returns 1 done, 0 if they cannot be joined or do not fit,
 * < 0 failed. If the result is not 1, the sequence is in any state: cut it. */
int32_t erl_state_set_joined(erl_context *context, int32_t sequence, const uint8_t *const *states,
                             const uint64_t *sizes, int32_t n);

/* libllama's own samplers, for comparisons. The engine does not use them. `name` is the suffix of the function
 * llama_sampler_init_<name> in llama.h, and `numbers` are its arguments in order. logit_bias takes the size of the
 * vocabulary, then a token and its bias, and so on. dry and grammar take texts and the vocabulary. Returns NULL if it
 * failed, or if libllama refused a grammar. */
struct llama_sampler *erl_sampler_new(const char *name, const double *numbers, int32_t n_numbers,
                                      const struct llama_vocab *vocab, const char **texts, int32_t n_texts);
void erl_sampler_free(struct llama_sampler *sampler);
int32_t erl_sampler_accept(struct llama_sampler *sampler, const int32_t *tokens, int32_t n);
/* Replaces n candidates by the remaining ones and returns their number. `sorted`, in and out: whether the logits are
 * known to fall. `selected` is the position of the chosen candidate, or -1. */
int32_t erl_sampler_apply(struct llama_sampler *sampler, int32_t n, int32_t *ids, float *logits, float *p,
                          int8_t *sorted, int32_t *selected);

/* GGUF files: only their metadata. */
struct gguf_context *erl_gguf_open(const char *path);
void erl_gguf_free(struct gguf_context *gguf);
int64_t erl_gguf_n_keys(const struct gguf_context *gguf);
const char *erl_gguf_key(const struct gguf_context *gguf, int64_t i);
int32_t erl_gguf_type(const struct gguf_context *gguf, int64_t i);
int32_t erl_gguf_array_type(const struct gguf_context *gguf, int64_t i);
int64_t erl_gguf_array_length(const struct gguf_context *gguf, int64_t i);
const void *erl_gguf_value(const struct gguf_context *gguf, int64_t i);
const char *erl_gguf_string(const struct gguf_context *gguf, int64_t i);
const char *erl_gguf_array_string(const struct gguf_context *gguf, int64_t i, int64_t j);
uint64_t erl_gguf_data_offset(const struct gguf_context *gguf);
int64_t erl_gguf_n_tensors(const struct gguf_context *gguf);
const char *erl_gguf_tensor_name(const struct gguf_context *gguf, int64_t i);
int32_t erl_gguf_tensor(const struct gguf_context *gguf, int64_t i, uint64_t *offset, uint64_t *size,
                        int32_t *type, int64_t shape[4]);

/* cffi: end */
#ifdef __cplusplus
}
#endif
#endif
