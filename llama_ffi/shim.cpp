// Implements shim.h over libllama. It catches all exceptions, keeps libllama
// from calling into Python (the log waits in a queue, progress and
// cancellation are atomics), and does the work of one tick in one call.
#include "shim.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"
#include "graph_check.h"
#include "llama.h"
#include "state_join.h"
#include "top_k.h"

static_assert(sizeof(llama_token) == 4 && sizeof(llama_pos) == 4 && sizeof(llama_seq_id) == 4,
              "the binding passes tokens, positions and sequences as 32-bit integers");

extern "C" int Py_AtExit(void (*function)(void));  // the only function of Python's stable ABI that is used here

namespace {

thread_local std::string last_error;
// The number of guarded calls on this thread's stack. An assertion may be thrown only within one.
thread_local int guard_depth = 0;

// The process may end while a thread is inside a decode. The exit destroys the libraries' static objects, which a
// decode uses. So running decodes are ended first.
std::atomic<bool> ending{false};
std::atomic<int> decodes{0};
pid_t process = 0;

void end_decodes() {
    if (getpid() != process) {
        return;  // a forked child: the thread of the decode exists only in the parent
    }
    ending = true;
    for (int i = 0; i < 5000 && decodes > 0; i++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

struct decoding {
    decoding() { decodes++; }
    ~decoding() { decodes--; }
};

struct assertion_failed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Whether this thread is inside a computation. Other threads may take part in it.
thread_local bool computing = false;
// When an assertion last ended a computation on its calling thread, in milliseconds of the steady clock.
std::atomic<int64_t> computation_failed_ms{INT64_MIN / 2};

int64_t clock_ns(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return (int64_t) now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t now_ms() {
    using namespace std::chrono;
    return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

// How long a worker thread waits for the calling thread to fail as well, and how long the calling thread waits.
constexpr int64_t others_fail_ms = 2000, others_start_ms = 50;

void on_assertion(const char *message) {
    const auto wait = [](int64_t ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); };
    if (guard_depth > 0) {
        if (computing) {
            computation_failed_ms.store(now_ms());
            wait(others_start_ms);  // late workers still read this thread's stack
        }
        throw assertion_failed(message);
    }
    // A worker thread of a backend, which cannot be unwound from here. If the calling thread fails as well and reports
    // it, this thread waits here forever, and the objects that it may use are never freed (see `failed_models`).
    for (const int64_t began = now_ms(); now_ms() - began < others_fail_ms; wait(10)) {
        if (began - computation_failed_ms.load() < others_fail_ms) {
            for (;;) {
                wait(1000000);
            }
        }
    }
    std::fprintf(stderr, "libllama: %s\n", message);
}

struct guard {
    guard() {
        guard_depth++;
        last_error.clear();
    }
    ~guard() { guard_depth--; }
};

template <typename R, typename F>
R guarded(R on_exception, R on_assert, F &&body) noexcept {
    guard g;
    try {
        return body();
    } catch (const assertion_failed &e) {
        last_error = std::string("assertion in libllama: ") + e.what();
        return on_assert;
    } catch (const std::exception &e) {
        last_error = e.what();
        return on_exception;
    } catch (...) {
        last_error = "an exception of unknown type";
        return on_exception;
    }
}

template <typename F>
int32_t guarded_code(F &&body) noexcept {
    return guarded<int32_t>(ERL_EXCEPTION, ERL_ASSERTION, body);
}

template <typename T, typename F>
T *guarded_pointer(F &&body) noexcept {
    return guarded<T *>(nullptr, nullptr, body);
}

template <typename F>
void guarded_void(F &&body) noexcept {
    guarded_code([&] {
        body();
        return 0;
    });
}

// The functions that rpc.patch adds to libllama's RPC backend, and the devices of its servers. They are not in ggml's
// list of devices, which has no lock, and from which models without `devices` would take them.
struct rpc_backend {
    ggml_backend_reg_t (*add_server)(const char *server) = nullptr;
    const char *(*problem)(const char *server) = nullptr;
    int64_t (*connection)(const char *server) = nullptr;
    void (*begin_state)() = nullptr;
    bool (*end_state)() = nullptr;
    bool complete = false;

    rpc_backend() {
        ggml_backend_reg_t backend = ggml_backend_reg_by_name("RPC");
        const auto get = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(
                backend ? ggml_backend_reg_get_proc_address(backend, name) : nullptr);
            return function != nullptr;
        };
        complete = get(add_server, "ggml_backend_rpc_add_server") && get(problem, "erl_rpc_problem") &&
                   get(connection, "erl_rpc_connection") && get(begin_state, "erl_rpc_begin_state") &&
                   get(end_state, "erl_rpc_end_state");
    }
};

const rpc_backend &rpc() {
    static const rpc_backend backend;
    return backend;
}

struct rpc_device {
    ggml_backend_dev_t device;
    const char *server;
};

std::mutex rpc_mutex;
std::deque<std::string> rpc_servers;  // a deque does not move its elements
std::vector<rpc_device> rpc_devices;

rpc_device device_at(int32_t i) {
    const int32_t n_local = (int32_t) ggml_backend_dev_count();
    if (i < n_local) {
        return {ggml_backend_dev_get(i), nullptr};
    }
    std::lock_guard<std::mutex> lock(rpc_mutex);
    return rpc_devices.at(i - n_local);
}

// Reads or writes the state of a sequence. A lost server fails it afterwards, because libllama copies in destructors.
template <typename F>
int64_t guarded_state(F &&body) noexcept {
    return guarded<int64_t>(ERL_EXCEPTION, ERL_ASSERTION, [&]() -> int64_t {
        if (!rpc().complete) {
            return body();
        }
        struct scope {
            bool ended = false;
            scope() { rpc().begin_state(); }
            ~scope() { end(); }
            bool end() { return !std::exchange(ended, true) && rpc().end_state(); }
        } state;
        const int64_t n = body();
        if (state.end()) {
            throw std::runtime_error("the connection to the RPC server was lost");
        }
        return n;
    });
}

// libllama's log, kept until Python reads it. It is bounded, because a model may log
// a line per tensor while no one reads.
constexpr size_t max_log_lines = 4096;

struct log_line {
    int32_t level;
    std::string text;
};

std::mutex log_mutex;
std::deque<log_line> log_lines;
log_line log_partial{GGML_LOG_LEVEL_INFO, ""};
std::atomic<int32_t> log_count{0};

// A second destination for this thread's log lines, during the load of a model or the creation of a context.
thread_local std::string *captured_log = nullptr;

struct log_capture {
    explicit log_capture(std::string *to) { captured_log = to; }
    ~log_capture() { captured_log = nullptr; }
};

void on_log(enum ggml_log_level level, const char *text, void *) {
    try {
        if (captured_log) {
            captured_log->append(text);
        }
        std::lock_guard<std::mutex> lock(log_mutex);
        if (level != GGML_LOG_LEVEL_CONT) {
            log_partial.level = level;
        }
        for (const char *at = text; *at;) {
            const char *newline = std::strchr(at, '\n');
            if (!newline) {
                log_partial.text.append(at);
                break;
            }
            log_partial.text.append(at, newline);
            at = newline + 1;
            if (log_lines.size() == max_log_lines) {
                log_lines.pop_front();
            }
            log_lines.push_back(log_partial);
            log_partial.text.clear();
            log_count.store((int32_t) log_lines.size());
        }
    } catch (...) {
        // A log line that is lost because memory is full must not end the process.
    }
}

}  // namespace

struct erl_load {
    std::atomic<float> progress{0.0f};
    std::atomic<bool> cancel{false};
    std::string log;
    std::vector<llama_model_kv_override> overrides;  // the last entry has an empty key
    const char *unused = nullptr;                    // the key of an override without effect
    bool checked = false;

    // libllama silently ignores an override whose key it does not read, or reads as another type. It logs the
    // overrides that it uses, all of them before it reads weights.
    void check_overrides() {
        for (size_t i = 0; !checked && !unused && i + 1 < overrides.size(); i++) {
            if (log.find(std::string(") '") + overrides[i].key + "' = ") == std::string::npos) {
                unused = overrides[i].key;
            }
        }
        checked = true;
    }
};

struct erl_context {
    llama_context *llama = nullptr;
    std::atomic<bool> abort{false};
    // The threads that compute beside the calling one. Without it, ggml would start them for each computation, unless it
    // uses OpenMP. Null for one thread.
    ggml_threadpool *pool = nullptr;
    pid_t pool_process = 0;  // a forked child does not have the threads
    int32_t n_threads = 1;
    // seq_id is an array of pointers in llama_batch: each row points into `sequences`.
    std::vector<int32_t> n_seq_id;
    std::vector<llama_seq_id> sequences;
    std::vector<llama_seq_id *> seq_id;
    int32_t n_vocab = 0;
    state_buffer joined;
    std::string log;
    bool failed = false;  // an assertion ended a computation on the calling thread; workers may still be inside it
};

namespace {

void start_threads(erl_context &context, int32_t n_threads) {
    context.n_threads = n_threads;
    if (n_threads > 1) {
        ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
        context.pool = ggml_threadpool_new(&params);
        context.pool_process = getpid();
        llama_attach_threadpool(context.llama, context.pool, context.pool);
    }
}

void free_threads(erl_context &context) {
    if (context.pool && context.pool_process == getpid()) {
        ggml_threadpool_free(context.pool);
    }
}

// The models of contexts that failed in this way. These models, their contexts and adapters are never freed, because a
// worker thread that waits in the failed computation still uses them. It is unknown when such a thread ends.
std::mutex failed_mutex;
std::vector<const llama_model *> failed_models;

void computation_failed(erl_context &context) {
    std::lock_guard<std::mutex> lock(failed_mutex);
    context.failed = true;
    failed_models.push_back(llama_get_model(context.llama));
}

bool has_failed(const llama_model *model) {
    std::lock_guard<std::mutex> lock(failed_mutex);
    return std::find(failed_models.begin(), failed_models.end(), model) != failed_models.end();
}

// Why row `i` of a batch of `n` would make libllama abort or compute wrong numbers; null if it would not.
const char *row_problem(const erl_context &context, int32_t n, int32_t i, const int32_t *tokens, const int32_t *positions,
                    const int32_t *sequences) {
    thread_local std::string reason;
    const int64_t n_ctx = llama_n_ctx(context.llama), n_seq_max = llama_n_seq_max(context.llama);
    if ((size_t) n > context.sequences.size()) {
        reason = "a batch of " + std::to_string(n) + " tokens; n_batch is " + std::to_string(context.sequences.size());
    } else if (tokens[i] < 0 || tokens[i] >= context.n_vocab) {
        reason = "token id " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                 std::to_string(context.n_vocab) + " tokens";
    } else if (sequences[i] < 0 || sequences[i] >= n_seq_max) {
        reason = "sequence " + std::to_string(sequences[i]) + " is outside 0 to n_seq_max - 1 = " +
                 std::to_string(n_seq_max - 1);
    } else if (positions[i] < 0 || positions[i] >= n_ctx) {
        reason = "position " + std::to_string(positions[i]) + " is outside 0 to n_ctx - 1 = " +
                 std::to_string(n_ctx - 1);
    } else if (i > 0 && sequences[i] == sequences[i - 1] && positions[i] != positions[i - 1] + 1) {
        reason = "position " + std::to_string(positions[i]) + " after " + std::to_string(positions[i - 1]) +
                 " of sequence " + std::to_string(sequences[i]) + ": positions must be consecutive";
    } else {
        return nullptr;
    }
    return reason.c_str();
}

llama_model_kv_override override_of(const erl_override &from) {
    llama_model_kv_override to = {};
    to.tag = (llama_model_kv_override_type) from.type;
    if (std::strlen(from.key) >= sizeof(to.key) || (from.text && std::strlen(from.text) >= sizeof(to.val_str))) {
        throw std::length_error("a metadata override has a key or a text of more than 127 bytes");
    }
    std::strcpy(to.key, from.key);
    switch (to.tag) {
        case LLAMA_KV_OVERRIDE_TYPE_INT: to.val_i64 = from.integer; break;
        case LLAMA_KV_OVERRIDE_TYPE_FLOAT: to.val_f64 = from.real; break;
        case LLAMA_KV_OVERRIDE_TYPE_BOOL: to.val_bool = from.integer != 0; break;
        case LLAMA_KV_OVERRIDE_TYPE_STR: std::strcpy(to.val_str, from.text); break;
    }
    return to;
}

// Checks and computes one batch, and measures its times. Returns the results of erl_decode. Without `output`, the context
// chooses the rows.
int32_t compute(erl_context &context, int32_t n, const int32_t *tokens, const int32_t *positions,
                const int32_t *sequences, const int8_t *output, erl_computed &computed) {
    for (int32_t i = 0; i < n; i++) {
        if (const char *reason = row_problem(context, n, i, tokens, positions, sequences)) {
            last_error = reason;
            return 3;
        }
    }
    std::memcpy(context.sequences.data(), sequences, n * sizeof(int32_t));
    llama_batch batch = {};
    batch.n_tokens = n;
    // llama_batch is not const-correct; llama_decode only reads these arrays.
    batch.token = const_cast<llama_token *>(tokens);
    batch.pos = const_cast<llama_pos *>(positions);
    batch.n_seq_id = context.n_seq_id.data();
    batch.seq_id = context.seq_id.data();
    batch.logits = const_cast<int8_t *>(output);
    if (context.failed) {
        last_error = "an assertion ended an earlier computation of this context; create another context";
        return ERL_ASSERTION;
    }
    decoding count;
    try {
        computing = true;
        const int64_t began[2] = {clock_ns(CLOCK_MONOTONIC), clock_ns(CLOCK_THREAD_CPUTIME_ID)};
        const int32_t code = ending ? 2 : llama_decode(context.llama, batch);
        computed.elapsed_ns = clock_ns(CLOCK_MONOTONIC) - began[0];
        computed.cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - began[1];
        computing = false;
        return code;
    } catch (const assertion_failed &) {
        computing = false;
        computation_failed(context);
        throw;
    } catch (...) {
        computing = false;
        throw;
    }
}

struct sampler_arguments {
    const double *numbers;
    int32_t n_numbers;
    const llama_vocab *vocab;
    const char **texts;
    int32_t n_texts;

    float real(int32_t i) const { return (float) numbers[i]; }
    int32_t whole(int32_t i) const { return (int32_t) numbers[i]; }
    uint32_t seed(int32_t i) const { return (uint32_t) numbers[i]; }
};

using args = const sampler_arguments &;

llama_sampler *new_logit_bias(args a) {
    std::vector<llama_logit_bias> biases;
    for (int32_t i = 1; i + 1 < a.n_numbers; i += 2) {
        biases.push_back({a.whole(i), a.real(i + 1)});
    }
    return llama_sampler_init_logit_bias(a.whole(0), (int32_t) biases.size(), biases.data());
}

llama_sampler *new_dry(args a) {
    return llama_sampler_init_dry(a.vocab, a.real(0), a.real(1), a.whole(2), a.whole(3), a.texts, a.n_texts);
}

// For each sampler: the minimum of numbers and texts, whether it reads the vocabulary, and its constructor.
const struct {
    const char *name;
    int32_t n_numbers, n_texts;
    bool vocab;
    llama_sampler *(*make)(args);
} sampler_kinds[] = {
    {"logit_bias", 1, 0, false, new_logit_bias},
    {"penalties", 5, 0, false,
     [](args a) { return llama_sampler_init_penalties(a.whole(0), a.whole(1), a.real(2), a.real(3), a.real(4)); }},
    {"dry", 4, 0, true, new_dry},
    {"top_n_sigma", 1, 0, false, [](args a) { return llama_sampler_init_top_n_sigma(a.real(0)); }},
    {"top_k", 1, 0, false, [](args a) { return llama_sampler_init_top_k(a.whole(0)); }},
    {"typical", 2, 0, false, [](args a) { return llama_sampler_init_typical(a.real(0), a.whole(1)); }},
    {"top_p", 2, 0, false, [](args a) { return llama_sampler_init_top_p(a.real(0), a.whole(1)); }},
    {"min_p", 2, 0, false, [](args a) { return llama_sampler_init_min_p(a.real(0), a.whole(1)); }},
    {"xtc", 4, 0, false, [](args a) { return llama_sampler_init_xtc(a.real(0), a.real(1), a.whole(2), a.seed(3)); }},
    {"temp", 1, 0, false, [](args a) { return llama_sampler_init_temp(a.real(0)); }},
    {"temp_ext", 3, 0, false, [](args a) { return llama_sampler_init_temp_ext(a.real(0), a.real(1), a.real(2)); }},
    {"mirostat", 5, 0, false,
     [](args a) { return llama_sampler_init_mirostat(a.whole(0), a.seed(1), a.real(2), a.real(3), a.whole(4)); }},
    {"mirostat_v2", 3, 0, false,
     [](args a) { return llama_sampler_init_mirostat_v2(a.seed(0), a.real(1), a.real(2)); }},
    {"dist", 1, 0, false, [](args a) { return llama_sampler_init_dist(a.seed(0)); }},
    {"greedy", 0, 0, false, [](args) { return llama_sampler_init_greedy(); }},
    {"grammar", 0, 2, true, [](args a) { return llama_sampler_init_grammar(a.vocab, a.texts[0], a.texts[1]); }},
};

}  // namespace

extern "C" {

const char *erl_last_error(void) { return last_error.c_str(); }

int32_t erl_init(void) {
    return guarded_code([] {
        llama_log_set(on_log, nullptr);
        if (process == 0) {
            // Runs after the interpreter has ended, and before the static objects of libraries are destroyed.
            Py_AtExit(end_decodes);
        }
        process = getpid();
        ggml_set_abort_callback(on_assertion);
        llama_backend_init();
        return 0;
    });
}

const char *erl_system_info(void) {
    return guarded_pointer<const char>([] { return llama_print_system_info(); });
}

int32_t erl_state_seq_version(void) { return LLAMA_STATE_SEQ_VERSION; }

int32_t erl_max_sequences(void) {
    return guarded_code([] { return (int32_t) llama_max_parallel_sequences(); });
}

int32_t erl_n_devices(void) {
    return guarded_code([] {
        std::lock_guard<std::mutex> lock(rpc_mutex);
        return (int32_t) (ggml_backend_dev_count() + rpc_devices.size());
    });
}

int32_t erl_device_of(int32_t i, erl_device *out) {
    return guarded_code([=] {
        ggml_backend_dev_props props = {};
        const rpc_device found = device_at(i);
        if (found.server && rpc().connection(found.server) == 0) {
            // To read the memory would connect to the server, which takes seconds if it does not answer.
            props.name = ggml_backend_dev_name(found.device);
            props.description = ggml_backend_dev_description(found.device);
            props.type = ggml_backend_dev_type(found.device);
        } else {
            ggml_backend_dev_get_props(found.device, &props);
        }
        *out = {props.name, props.description, props.device_id, found.server, (int32_t) props.type, props.memory_free,
                props.memory_total};
        return 0;
    });
}

int32_t erl_rpc_add(const char *server) {
    return guarded_code([=]() -> int32_t {
        if (!rpc().complete) {
            return 1;
        }
        std::lock_guard<std::mutex> lock(rpc_mutex);
        ggml_backend_reg_t added = rpc().add_server(server);
        const char *problem = added ? rpc().problem(server) : "it does not answer, or not as an RPC server of this version";
        if (problem) {
            last_error = problem;
            return 2;
        }
        if (std::find(rpc_servers.begin(), rpc_servers.end(), server) == rpc_servers.end()) {
            rpc_servers.emplace_back(server);
            for (size_t i = 0; i < ggml_backend_reg_dev_count(added); i++) {
                rpc_devices.push_back({ggml_backend_reg_dev_get(added, i), rpc_servers.back().c_str()});
            }
        }
        return 0;
    });
}

int64_t erl_rpc_connection(const char *server) {
    return guarded<int64_t>(0, 0, [=] { return rpc().complete ? rpc().connection(server) : 0; });
}

int32_t erl_log_pending(void) { return log_count.load(); }

int32_t erl_log_next(int32_t *level, char *buffer, int32_t size) {
    return guarded_code([=]() -> int32_t {
        std::lock_guard<std::mutex> lock(log_mutex);
        if (log_lines.empty()) {
            return -1;
        }
        const log_line &line = log_lines.front();
        int32_t n = (int32_t) std::min<size_t>(line.text.size(), (size_t) size);
        std::memcpy(buffer, line.text.data(), n);
        *level = line.level;
        log_lines.pop_front();
        log_count.store((int32_t) log_lines.size());
        return n;
    });
}

int32_t erl_ggml_type(const char *name) {
    return guarded_code([=]() -> int32_t {
        for (int32_t type = 0; type < GGML_TYPE_COUNT; type++) {
            const char *candidate = ggml_type_name((ggml_type) type);
            if (candidate && std::strcmp(candidate, name) == 0) {
                return type;
            }
        }
        return -1;
    });
}

int64_t erl_ggml_block_size(int32_t type) {
    return guarded<int64_t>(ERL_EXCEPTION, ERL_ASSERTION, [=] { return (int64_t) ggml_blck_size((ggml_type) type); });
}

int64_t erl_ggml_type_bytes(int32_t type) {
    return guarded<int64_t>(ERL_EXCEPTION, ERL_ASSERTION, [=] { return (int64_t) ggml_type_size((ggml_type) type); });
}

// --- models ------------------------------------------------------------------------

erl_load *erl_load_new(void) {
    return guarded_pointer<erl_load>([] { return new erl_load(); });
}
float erl_load_progress(const erl_load *load) { return load->progress.load(); }
void erl_load_cancel(erl_load *load) { load->cancel.store(true); }
const char *erl_load_log(const erl_load *load) { return load->log.c_str(); }
const char *erl_load_unused(const erl_load *load) { return load->unused; }
void erl_load_free(erl_load *load) { delete load; }

struct llama_model *erl_model_load(const char *path, const erl_model_options *options, erl_load *load) {
    return guarded_pointer<llama_model>([=] {
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers = options->n_gpu_layers;
        params.load_mode = options->mmap ? (options->mlock ? LLAMA_LOAD_MODE_MMAP_MLOCK : LLAMA_LOAD_MODE_MMAP)
                                         : (options->mlock ? LLAMA_LOAD_MODE_MLOCK : LLAMA_LOAD_MODE_NONE);
        params.vocab_only = options->vocab_only;
        params.split_mode = (llama_split_mode) options->split_mode;
        params.main_gpu = options->main_gpu;
        std::vector<ggml_backend_dev_t> devices;
        for (int32_t i = 0; i < options->n_devices; i++) {
            devices.push_back(device_at(options->devices[i]).device);
        }
        devices.push_back(nullptr);
        params.devices = options->n_devices < 0 ? nullptr : devices.data();
        std::vector<float> shares(llama_max_devices());
        if (options->tensor_split && options->n_devices > 0 && (size_t) options->n_devices <= shares.size()) {
            std::copy_n(options->tensor_split, options->n_devices, shares.begin());
            params.tensor_split = shares.data();
        }
        for (int32_t i = 0; i < options->n_overrides; i++) {
            load->overrides.push_back(override_of(options->overrides[i]));
        }
        load->overrides.push_back({});
        params.kv_overrides = load->overrides.data();
        params.progress_callback_user_data = load;
        params.progress_callback = [](float progress, void *user) {
            erl_load *load = static_cast<erl_load *>(user);
            load->check_overrides();
            load->progress.store(progress);
            return !load->cancel.load() && !load->unused;
        };
        log_capture capture(&load->log);
        llama_model *model = llama_model_load_from_file(path, params);
        if (model) {
            load->check_overrides();  // a load of only the vocabulary reports no progress
        }
        load->progress.store(model && !load->unused ? 1.0f : load->progress.load());
        return model;
    });
}

void erl_model_free(struct llama_model *model) {
    guarded_void([=] {
        if (!has_failed(model)) {
            llama_model_free(model);
        }
    });
}

int32_t erl_model_shape_of(struct llama_model *model, erl_model_shape *out) {
    return guarded_code([=] {
        out->n_ctx_train = llama_model_n_ctx_train(model);
        out->n_embd = llama_model_n_embd(model);
        out->n_embd_out = llama_model_n_embd_out(model);
        out->n_cls_out = (int32_t) llama_model_n_cls_out(model);
        out->n_layer = llama_model_n_layer(model);
        // A model that was loaded for its vocabulary has no layers.
        out->n_head = out->n_layer > 0 ? llama_model_n_head(model) : 0;
        out->n_head_kv = out->n_layer > 0 ? llama_model_n_head_kv(model) : 0;
        out->n_swa = llama_model_n_swa(model);
        out->rope_type = (int32_t) llama_model_rope_type(model);
        out->n_bytes = llama_model_size(model);
        out->n_params = llama_model_n_params(model);
        out->recurrent = llama_model_is_recurrent(model);
        out->hybrid = llama_model_is_hybrid(model);
        out->diffusion = llama_model_is_diffusion(model);
        out->has_encoder = llama_model_has_encoder(model);
        out->has_decoder = llama_model_has_decoder(model);
        return 0;
    });
}

int32_t erl_model_desc(struct llama_model *model, char *buffer, size_t size) {
    return guarded_code([=] { return llama_model_desc(model, buffer, size); });
}

const char *erl_model_file_type(struct llama_model *model) {
    return guarded_pointer<const char>([=] { return llama_ftype_name(llama_model_ftype(model)); });
}

int32_t erl_model_meta_count(struct llama_model *model) {
    return guarded_code([=] { return llama_model_meta_count(model); });
}

int32_t erl_model_meta_key(struct llama_model *model, int32_t i, char *buffer, size_t size) {
    return guarded_code([=] { return llama_model_meta_key_by_index(model, i, buffer, size); });
}

int32_t erl_model_meta_value(struct llama_model *model, int32_t i, char *buffer, size_t size) {
    return guarded_code([=] { return llama_model_meta_val_str_by_index(model, i, buffer, size); });
}

const char *erl_model_chat_template(struct llama_model *model, const char *name) {
    return guarded_pointer<const char>([=] { return llama_model_chat_template(model, name); });
}

// --- vocabularies --------------------------------------------------------------------

const struct llama_vocab *erl_vocab(struct llama_model *model) {
    return guarded_pointer<const llama_vocab>([=] { return llama_model_get_vocab(model); });
}

int32_t erl_vocab_shape_of(const struct llama_vocab *vocab, erl_vocab_shape *out) {
    return guarded_code([=] {
        out->n_tokens = llama_vocab_n_tokens(vocab);
        out->type = (int32_t) llama_vocab_type(vocab);
        out->bos = llama_vocab_bos(vocab);
        out->eos = llama_vocab_eos(vocab);
        out->eot = llama_vocab_eot(vocab);
        out->nl = llama_vocab_nl(vocab);
        out->pad = llama_vocab_pad(vocab);
        out->sep = llama_vocab_sep(vocab);
        out->mask = llama_vocab_mask(vocab);
        out->fim_pre = llama_vocab_fim_pre(vocab);
        out->fim_suf = llama_vocab_fim_suf(vocab);
        out->fim_mid = llama_vocab_fim_mid(vocab);
        out->add_bos = llama_vocab_get_add_bos(vocab);
        out->add_eos = llama_vocab_get_add_eos(vocab);
        out->add_sep = llama_vocab_get_add_sep(vocab);
        return 0;
    });
}

const char *erl_vocab_text(const struct llama_vocab *vocab, int32_t token) {
    return guarded_pointer<const char>([=] { return llama_vocab_get_text(vocab, token); });
}

int32_t erl_vocab_attributes(const struct llama_vocab *vocab, int32_t *attributes, int8_t *is_eog, int32_t n) {
    return guarded_code([=] {
        for (int32_t token = 0; token < n; token++) {
            attributes[token] = (int32_t) llama_vocab_get_attr(vocab, token);
            is_eog[token] = llama_vocab_is_eog(vocab, token) ? 1 : 0;
        }
        return 0;
    });
}

int64_t erl_vocab_pieces(const struct llama_vocab *vocab, char *buffer, int64_t size, uint32_t *ends, int32_t n) {
    return guarded<int64_t>(ERL_EXCEPTION, ERL_ASSERTION, [=]() -> int64_t {
        int64_t at = 0;
        for (int32_t token = 0; token < n; token++) {
            const int32_t room = (int32_t) std::clamp<int64_t>(size - at, 0, INT32_MAX);
            const int32_t length = llama_token_to_piece(vocab, token, buffer + (room ? at : 0), room, 0, false);
            at += length < 0 ? -length : length;
            if (at > UINT32_MAX) {
                throw std::length_error("the tokens' texts are longer than 4 GiB");
            }
            ends[token] = (uint32_t) at;
        }
        return at;
    });
}

int32_t erl_tokenize(const struct llama_vocab *vocab, const char *text, int32_t n_text, int32_t *tokens,
                     int32_t n_max, int32_t add_special, int32_t parse_special) {
    return guarded_code(
        [=] { return llama_tokenize(vocab, text, n_text, tokens, n_max, add_special != 0, parse_special != 0); });
}

int32_t erl_token_piece(const struct llama_vocab *vocab, int32_t token, char *buffer, int32_t size, int32_t special) {
    return guarded_code([=] { return llama_token_to_piece(vocab, token, buffer, size, 0, special != 0); });
}

int32_t erl_detokenize(const struct llama_vocab *vocab, const int32_t *tokens, int32_t n_tokens, char *buffer,
                       int32_t size, int32_t strip_space, int32_t special) {
    return guarded_code([=]() -> int32_t {
        // Not llama_detokenize, because for some vocabularies it changes spaces, and the text would not be exact.
        int64_t written = 0;
        bool fits = true, strip = strip_space != 0;
        for (int32_t i = 0; i < n_tokens; i++) {
            int32_t room = fits ? (int32_t) (size - written) : 0;
            int32_t n = llama_token_to_piece(vocab, tokens[i], buffer + (fits ? written : 0), room, strip, special != 0);
            fits = fits && n >= 0;
            written += n < 0 ? -(int64_t) n : n;
            // Up to the first token with text. A token that is only a space counts as text.
            strip = strip && n == 0 && llama_token_to_piece(vocab, tokens[i], buffer, 0, 0, special != 0) == 0;
        }
        if (written > INT32_MAX) {
            throw std::length_error("the text has more than 2 GiB");
        }
        return fits ? (int32_t) written : (int32_t) -written;
    });
}

// --- contexts --------------------------------------------------------------------------

erl_context *erl_context_new(struct llama_model *model, const erl_context_options *options) {
    return guarded_pointer<erl_context>([=]() -> erl_context * {
        erl_context *context = new erl_context();
        llama_context_params params = llama_context_default_params();
        params.n_ctx = options->n_ctx;
        params.n_batch = options->n_batch;
        params.n_ubatch = options->n_ubatch;
        params.n_seq_max = options->n_seq_max;
        params.n_threads = options->n_threads;
        params.n_threads_batch = options->n_threads_batch;
        params.flash_attn_type = (llama_flash_attn_type) options->flash_attn;
        params.type_k = (ggml_type) options->type_k;
        params.type_v = (ggml_type) options->type_v;
        params.rope_freq_base = options->rope_freq_base;
        params.rope_freq_scale = options->rope_freq_scale;
        params.rope_scaling_type = (llama_rope_scaling_type) options->rope_scaling;
        params.yarn_ext_factor = options->yarn_ext_factor;
        params.yarn_attn_factor = options->yarn_attn_factor;
        params.yarn_beta_fast = options->yarn_beta_fast;
        params.yarn_beta_slow = options->yarn_beta_slow;
        params.yarn_orig_ctx = options->yarn_orig_ctx;
        params.offload_kqv = options->offload_kqv;
        params.swa_full = options->swa_full;
        params.kv_unified = options->kv_unified;
        params.embeddings = options->embeddings;
        params.pooling_type = (enum llama_pooling_type) options->pooling;
        params.no_perf = true;
        params.abort_callback_data = &context->abort;
        params.abort_callback = [](void *flag) {
            return ending.load() || static_cast<std::atomic<bool> *>(flag)->load();
        };
        try {
            log_capture capture(&context->log);
            context->llama = llama_init_from_model(model, params);
            const std::string reason = context->llama ? graph_problem(context->llama) : "";
            if (!reason.empty()) {
                throw std::runtime_error(reason);
            }
            if (context->llama) {
                start_threads(*context, std::max(options->n_threads, options->n_threads_batch));
            }
        } catch (...) {
            llama_free(context->llama);
            delete context;
            throw;
        }
        if (!context->llama) {
            delete context;
            return nullptr;
        }
        size_t n_batch = llama_n_batch(context->llama);
        context->n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        context->n_seq_id.assign(n_batch, 1);
        context->sequences.assign(n_batch, 0);
        context->seq_id.resize(n_batch);
        for (size_t i = 0; i < n_batch; i++) {
            context->seq_id[i] = &context->sequences[i];
        }
        return context;
    });
}

void erl_context_free(erl_context *context) {
    guarded_void([=] {
        if (!context->failed) {
            llama_free(context->llama);
            free_threads(*context);
            delete context;
        }
    });
}

int32_t erl_context_threads(erl_context *context, int32_t n_threads) {
    return guarded_code([=] {
        if (n_threads < 1 || n_threads > context->n_threads) {
            throw std::invalid_argument(std::to_string(n_threads) + " threads; the context has " +
                                        std::to_string(context->n_threads));
        }
        llama_set_n_threads(context->llama, n_threads, n_threads);
        return 0;
    });
}

void erl_context_abort(erl_context *context, int32_t abort) { context->abort.store(abort != 0); }

uint32_t erl_context_n_ctx(const erl_context *context) { return llama_n_ctx(context->llama); }
uint32_t erl_context_n_batch(const erl_context *context) { return llama_n_batch(context->llama); }
uint32_t erl_context_n_ubatch(const erl_context *context) { return llama_n_ubatch(context->llama); }
const char *erl_context_log(const erl_context *context) { return context->log.c_str(); }

int32_t erl_decode(erl_context *context, int32_t n, const int32_t *tokens, const int32_t *positions,
                   const int32_t *sequences, const int8_t *output, int32_t n_rows, int32_t max_rows,
                   erl_computed *computed) {
    return guarded_code([=]() -> int32_t {
        *computed = {};
        computed->n_rows = n - (int32_t) std::count(output, output + n, 0);
        if (computed->n_rows > max_rows) {
            return 4;
        }
        const int32_t code = compute(*context, n, tokens, positions, sequences, output, *computed);
        if (code != 0) {
            return code;
        }
        if (computed->n_rows > 0) {
            computed->logits = llama_get_logits(context->llama);
        }
        return computed->n_rows == n_rows && log_count.load() == 0 ? 0 : 5;
    });
}

int32_t erl_context_has_memory(const erl_context *context) {
    return guarded_code([=] { return llama_get_memory(context->llama) ? 1 : 0; });
}

int32_t erl_embed(erl_context *context, int32_t n, const int32_t *tokens, const int32_t *positions,
                  const int32_t *sequences, int32_t n_sequences, float *rows, int32_t width,
                  erl_computed *computed) {
    return guarded_code([=]() -> int32_t {
        *computed = {};
        llama_memory_clear(llama_get_memory(context->llama), false);
        const int32_t code = compute(*context, n, tokens, positions, sequences, nullptr, *computed);
        if (code != 0) {
            return code;
        }
        const bool pooled = llama_pooling_type(context->llama) != LLAMA_POOLING_TYPE_NONE;
        for (int32_t i = 0; i < (pooled ? n_sequences : n); i++) {
            const float *row = pooled ? llama_get_embeddings_seq(context->llama, i)
                                      : llama_get_embeddings_ith(context->llama, i);
            if (!row) {
                throw std::runtime_error("the model computed no embeddings");
            }
            std::copy_n(row, width, rows + (size_t) i * width);
        }
        return 0;
    });
}

int32_t erl_argmax(const float *rows, int32_t n_rows, int32_t n, int32_t *positions) {
    return guarded_code([=] {
        largest_numbers largest(1);
        for (int32_t i = 0; i < n_rows; i++) {
            const float *row = rows + (size_t) i * n;
            largest.find(row, n);
            positions[i] = std::isfinite(row[largest.position(0)]) ? largest.position(0) : -1;
        }
        return 0;
    });
}

int32_t erl_top_k(const float *rows, int32_t n_rows, int32_t n, int32_t k, intptr_t *positions, float *numbers) {
    return guarded_code([=]() mutable {
        largest_numbers largest(k);
        for (const float *row = rows; n_rows > 0; n_rows--, row += n) {
            const int32_t n_found = largest.find(row, n) ? k : 1;
            for (int32_t i = 0; i < n_found; i++) {
                positions[i] = largest.position(i);
                numbers[i] = row[positions[i]];
            }
            positions += k;
            numbers += k;
        }
        return 0;
    });
}

struct llama_adapter_lora *erl_adapter_load(struct llama_model *model, const char *path) {
    return guarded_pointer<llama_adapter_lora>([=] { return llama_adapter_lora_init(model, path); });
}

void erl_adapter_free(struct llama_model *model, struct llama_adapter_lora *adapter) {
    guarded_void([=] {
        if (!has_failed(model)) {
            llama_adapter_lora_free(adapter);
        }
    });
}

int32_t erl_context_adapters(erl_context *context, struct llama_adapter_lora **adapters, float *scales, int32_t n) {
    return guarded_code([=] { return llama_set_adapters_lora(context->llama, adapters, (size_t) n, scales); });
}

int32_t erl_memory_clear(erl_context *context, int32_t zero) {
    return guarded_code([=] {
        llama_memory_clear(llama_get_memory(context->llama), zero != 0);
        return 0;
    });
}

int32_t erl_memory_cut(erl_context *context, int32_t sequence, int32_t p0, int32_t p1) {
    return guarded_code(
        [=] { return llama_memory_seq_rm(llama_get_memory(context->llama), sequence, p0, p1) ? 1 : 0; });
}

int32_t erl_memory_copy(erl_context *context, int32_t source, int32_t target, int32_t p0, int32_t p1) {
    return guarded_code([=] {
        llama_memory_seq_cp(llama_get_memory(context->llama), source, target, p0, p1);
        return 0;
    });
}

int32_t erl_memory_first(erl_context *context, int32_t sequence) {
    return guarded_code([=] { return llama_memory_seq_pos_min(llama_get_memory(context->llama), sequence); });
}

int32_t erl_memory_last(erl_context *context, int32_t sequence) {
    return guarded_code([=] { return llama_memory_seq_pos_max(llama_get_memory(context->llama), sequence); });
}

int64_t erl_state_size(erl_context *context, int32_t sequence) {
    return guarded<int64_t>(ERL_EXCEPTION, ERL_ASSERTION,
                            [=] { return (int64_t) llama_state_seq_get_size(context->llama, sequence); });
}

int64_t erl_state_get(erl_context *context, int32_t sequence, uint8_t *buffer, size_t size) {
    return guarded_state([=] { return (int64_t) llama_state_seq_get_data(context->llama, buffer, size, sequence); });
}

int64_t erl_state_set(erl_context *context, int32_t sequence, const uint8_t *buffer, size_t size) {
    return guarded_state([=] { return (int64_t) llama_state_seq_set_data(context->llama, buffer, size, sequence); });
}

int32_t erl_state_set_joined(erl_context *context, int32_t sequence, const uint8_t *const *states,
                             const uint64_t *sizes, int32_t n) {
    return (int32_t) guarded_state([=]() -> int64_t {
        state_buffer &joined = context->joined;
        if (!join_states(states, sizes, n, joined)) {
            return 0;
        }
        const size_t read = llama_state_seq_set_data(context->llama, joined.bytes.get(), joined.size, sequence);
        return read == joined.size ? 1 : 0;
    });
}

// --- samplers ----------------------------------------------------------------------------

struct llama_sampler *erl_sampler_new(const char *name, const double *numbers, int32_t n_numbers,
                                      const struct llama_vocab *vocab, const char **texts, int32_t n_texts) {
    return guarded_pointer<llama_sampler>([=] {
        for (const auto &kind : sampler_kinds) {
            if (std::strcmp(kind.name, name) == 0 && n_numbers >= kind.n_numbers && n_texts >= kind.n_texts &&
                (vocab || !kind.vocab)) {
                return kind.make({numbers, n_numbers, vocab, texts, n_texts});
            }
        }
        throw std::invalid_argument(std::string("too few arguments for the sampler ") + name + ", or an unknown sampler");
    });
}

void erl_sampler_free(struct llama_sampler *sampler) {
    guarded_void([=] { llama_sampler_free(sampler); });
}

int32_t erl_sampler_accept(struct llama_sampler *sampler, const int32_t *tokens, int32_t n) {
    return guarded_code([=] {
        for (int32_t i = 0; i < n; i++) {
            llama_sampler_accept(sampler, tokens[i]);
        }
        return 0;
    });
}

int32_t erl_sampler_apply(struct llama_sampler *sampler, int32_t n, int32_t *ids, float *logits, float *p,
                          int8_t *sorted, int32_t *selected) {
    return guarded_code([=] {
        std::vector<llama_token_data> candidates(n);
        for (int32_t i = 0; i < n; i++) {
            candidates[i] = {ids[i], logits[i], 0.0f};
        }
        llama_token_data_array array = {candidates.data(), candidates.size(), -1, *sorted != 0};
        llama_sampler_apply(sampler, &array);
        // Not from `candidates`: the remaining ones may start at a later position in it.
        for (size_t i = 0; i < array.size; i++) {
            ids[i] = array.data[i].id;
            logits[i] = array.data[i].logit;
            p[i] = array.data[i].p;
        }
        *sorted = array.sorted ? 1 : 0;
        *selected = (int32_t) array.selected;
        return (int32_t) array.size;
    });
}

// --- GGUF files ----------------------------------------------------------------------------

struct gguf_context *erl_gguf_open(const char *path) {
    return guarded_pointer<gguf_context>([=] {
        gguf_init_params params = {/*.no_alloc =*/true, /*.ctx =*/nullptr};
        return gguf_init_from_file(path, params);
    });
}

void erl_gguf_free(struct gguf_context *gguf) {
    guarded_void([=] { gguf_free(gguf); });
}

int64_t erl_gguf_n_keys(const struct gguf_context *gguf) { return gguf_get_n_kv(gguf); }

const char *erl_gguf_key(const struct gguf_context *gguf, int64_t i) {
    return guarded_pointer<const char>([=] { return gguf_get_key(gguf, i); });
}

int32_t erl_gguf_type(const struct gguf_context *gguf, int64_t i) {
    return guarded_code([=] { return (int32_t) gguf_get_kv_type(gguf, i); });
}

int32_t erl_gguf_array_type(const struct gguf_context *gguf, int64_t i) {
    return guarded_code([=] { return (int32_t) gguf_get_arr_type(gguf, i); });
}

int64_t erl_gguf_array_length(const struct gguf_context *gguf, int64_t i) {
    return guarded<int64_t>(ERL_EXCEPTION, ERL_ASSERTION, [=] { return (int64_t) gguf_get_arr_n(gguf, i); });
}

const void *erl_gguf_value(const struct gguf_context *gguf, int64_t i) {
    return guarded_pointer<const void>([=] {
        return gguf_get_kv_type(gguf, i) == GGUF_TYPE_ARRAY ? gguf_get_arr_data(gguf, i) : gguf_get_val_data(gguf, i);
    });
}

const char *erl_gguf_string(const struct gguf_context *gguf, int64_t i) {
    return guarded_pointer<const char>([=] { return gguf_get_val_str(gguf, i); });
}

const char *erl_gguf_array_string(const struct gguf_context *gguf, int64_t i, int64_t j) {
    return guarded_pointer<const char>([=] { return gguf_get_arr_str(gguf, i, (size_t) j); });
}

uint64_t erl_gguf_data_offset(const struct gguf_context *gguf) { return gguf_get_data_offset(gguf); }
int64_t erl_gguf_n_tensors(const struct gguf_context *gguf) { return gguf_get_n_tensors(gguf); }

const char *erl_gguf_tensor_name(const struct gguf_context *gguf, int64_t i) {
    return guarded_pointer<const char>([=] { return gguf_get_tensor_name(gguf, i); });
}

int32_t erl_gguf_tensor(const struct gguf_context *gguf, int64_t i, uint64_t *offset, uint64_t *size, int32_t *type,
                        int64_t shape[4]) {
    return guarded_code([=] {
        *offset = gguf_get_tensor_offset(gguf, i);
        *size = gguf_get_tensor_size(gguf, i);
        *type = (int32_t) gguf_get_tensor_type(gguf, i);
        const int64_t *ne = gguf_get_tensor_ne(gguf, i);
        for (int d = 0; d < 4; d++) {
            shape[d] = ne[d];
        }
        return 0;
    });
}

}  // extern "C"
