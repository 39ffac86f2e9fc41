// Checks a model's graph before anything is computed. An operation whose types or parameters ggml does not
// support fails an assertion, or calls a function that is not there, on all threads of a computation at once:
// that cannot be survived. The same is found out here, on one thread, when a context is made.
//
// The rules are those of ggml's CPU backend, which computes what no other backend takes. Shapes are not
// checked: ggml does so as the graph is built, on the calling thread, where a failed assertion is an exception.
#include "graph_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "ggml.h"
#include "llama.h"

// libllama exports it; its header, llama-ext.h, is not installed.
LLAMA_API struct ggml_cgraph *llama_graph_reserve(struct llama_context *ctx, uint32_t n_tokens, uint32_t n_seqs,
                                                  uint32_t n_outputs);

namespace {

using node = const ggml_tensor *;

bool is(node t, std::initializer_list<ggml_type> types) {
    return t && std::find(types.begin(), types.end(), t->type) != types.end();
}

// Q8_1 and Q8_K hold intermediate results: nothing is multiplied by weights of these types.
bool is_weight_type(node t) {
    return is(t, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) ||
           (ggml_is_quantized(t->type) && !is(t, {GGML_TYPE_Q8_1, GGML_TYPE_Q8_K}));
}

int32_t whole(node t, int i) { return t->op_params[i]; }

float real(node t, int i) {
    float value;
    std::memcpy(&value, &t->op_params[i], sizeof value);
    return value;
}

bool contiguous_elements(node t) { return t->nb[0] == ggml_type_size(t->type); }

bool all_f32(node t) {
    for (node source : t->src) {
        if (source && !is(source, {GGML_TYPE_F32, GGML_TYPE_I32})) {
            return false;
        }
    }
    return true;
}

bool multiplies(node t) {
    return is_weight_type(t->src[0]) && contiguous_elements(t->src[0]) && contiguous_elements(t->src[1]) &&
           (t->src[1]->type == GGML_TYPE_F32 || t->src[1]->type == t->src[0]->type);
}

bool picks_rows(node t) { return is_weight_type(t->src[0]) || is(t->src[0], {GGML_TYPE_I32}); }

// f32 with f32; f16 or bf16 with f32 or with its own.
bool combines(node t) {
    node a = t->src[0], b = t->src[1];
    const bool same_as_result = t->type == a->type || (t->type == GGML_TYPE_F32 && b->type == GGML_TYPE_F32);
    return is(a, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) && same_as_result &&
           (b->type == GGML_TYPE_F32 || b->type == a->type) && contiguous_elements(a);
}

bool adds(node t) {
    return combines(t) || (ggml_is_quantized(t->src[0]->type) && is_weight_type(t->src[0]) &&
                           t->src[1]->type == GGML_TYPE_F32 && ggml_are_same_shape(t->src[0], t->src[1]));
}

bool normalizes(node t) {
    const float epsilon = real(t, t->op == GGML_OP_GROUP_NORM ? 1 : 0);
    return all_f32(t) && contiguous_elements(t->src[0]) && std::isfinite(epsilon) && epsilon >= 0.0f &&
           (t->op != GGML_OP_GROUP_NORM || whole(t, 0) > 0);
}

bool rotates(node t) {
    const int64_t n_dims = whole(t, 1), n_skipped = whole(t, 15), size = t->src[0]->ne[0];
    const int32_t mode = whole(t, 2);
    int64_t sum = 0, least = 0;
    for (int i = 11; i < 15; i++) {
        sum += whole(t, i);
        least = std::min<int64_t>(least, whole(t, i));
    }
    // Sections: of positions with several parts.
    const bool sections = (mode & GGML_ROPE_TYPE_MROPE) == 0 || (least >= 0 && sum > 0 && sum <= size);
    node factors = t->src[2];
    return is(t->src[0], {GGML_TYPE_F32, GGML_TYPE_F16}) && is(t->src[1], {GGML_TYPE_I32}) &&
           contiguous_elements(t->src[0]) && size % 2 == 0 && n_dims > 0 && n_dims % 2 == 0 && n_skipped >= 0 &&
           n_skipped % 2 == 0 && n_skipped + n_dims <= size && sections &&
           (mode != GGML_ROPE_TYPE_VISION || n_dims == size / 2) &&
           (!factors || (factors->type == GGML_TYPE_F32 && factors->ne[0] >= n_dims / 2));
}

bool scans(node t) { return all_f32(t) && t->src[4]->ne[1] > 0 && t->src[1]->ne[1] % t->src[4]->ne[1] == 0; }

bool converts(node t) {
    node from = t->src[0];
    const ggml_type to = t->type;
    return from->type == to || is(from, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) ||
           ((ggml_is_quantized(from->type) || from->type == GGML_TYPE_I32) && to == GGML_TYPE_F32);
}

bool real_numbers(node t) { return is(t->src[0], {GGML_TYPE_F32, GGML_TYPE_F16}); }

bool gates(node t) { return real_numbers(t) && (!t->src[1] || t->src[1]->type == t->src[0]->type); }

bool attends(node t) {
    node k = t->src[1], v = t->src[2], sinks = t->src[4];
    return t->src[0]->type == GGML_TYPE_F32 && is_weight_type(k) && is_weight_type(v) &&
           (!sinks || sinks->type == GGML_TYPE_F32);
}

bool scales(node t) { return all_f32(t) && ggml_is_contiguous(t->src[0]); }

const struct {
    ggml_op op;
    bool (*computable)(node);
    const char *wants;
} rules[] = {
    {GGML_OP_MUL_MAT, multiplies, "weights of real numbers"},
    {GGML_OP_MUL_MAT_ID, multiplies, "weights of real numbers"},
    {GGML_OP_GET_ROWS, picks_rows, "rows of real numbers or of i32"},
    {GGML_OP_ADD, adds, "two f32 operands"},
    {GGML_OP_SUB, combines, "two f32 operands"},
    {GGML_OP_MUL, combines, "two f32 operands"},
    {GGML_OP_DIV, combines, "two f32 operands"},
    {GGML_OP_ADD_ID, all_f32, "f32 operands"},
    {GGML_OP_NORM, normalizes, "f32, and an epsilon that is finite and not negative"},
    {GGML_OP_RMS_NORM, normalizes, "f32, and an epsilon that is finite and not negative"},
    {GGML_OP_L2_NORM, normalizes, "f32, and an epsilon that is finite and not negative"},
    {GGML_OP_GROUP_NORM, normalizes, "f32, groups, and an epsilon that is finite and not negative"},
    {GGML_OP_ROPE, rotates, "an even number of dimensions within a head, sections within them, and f32 factors"},
    {GGML_OP_SOFT_MAX, [](node t) { return is(t->src[0], {GGML_TYPE_F32}) && (!t->src[2] || is(t->src[2], {GGML_TYPE_F32})); },
     "f32 operands"},
    {GGML_OP_SCALE, scales, "f32 operands"},
    {GGML_OP_SSM_CONV, all_f32, "f32 operands"},
    {GGML_OP_SSM_SCAN, scans, "f32 operands, and heads that groups divide"},
    {GGML_OP_RWKV_WKV6, all_f32, "f32 operands"},
    {GGML_OP_RWKV_WKV7, all_f32, "f32 operands"},
    {GGML_OP_GATED_LINEAR_ATTN, all_f32, "f32 operands"},
    {GGML_OP_GATED_DELTA_NET, all_f32, "f32 operands"},
    {GGML_OP_SOLVE_TRI, all_f32, "f32 operands"},
    {GGML_OP_CUMSUM, all_f32, "f32 operands"},
    {GGML_OP_SUM_ROWS, all_f32, "f32 operands"},
    {GGML_OP_MEAN, all_f32, "f32 operands"},
    {GGML_OP_SQR, all_f32, "f32 operands"},
    {GGML_OP_SQRT, all_f32, "f32 operands"},
    {GGML_OP_LOG, all_f32, "f32 operands"},
    {GGML_OP_SIN, all_f32, "f32 operands"},
    {GGML_OP_COS, all_f32, "f32 operands"},
    {GGML_OP_CLAMP, real_numbers, "f32 or f16"},
    {GGML_OP_UNARY, real_numbers, "f32 or f16"},
    {GGML_OP_GLU, gates, "f32 or f16, both alike"},
    {GGML_OP_ARGSORT, all_f32, "f32 operands"},
    {GGML_OP_TOP_K, all_f32, "f32 operands"},
    {GGML_OP_PAD, all_f32, "f32 operands"},
    {GGML_OP_ROLL, all_f32, "f32 operands"},
    {GGML_OP_REPEAT, [](node t) { return is(t->src[0], {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_I32, GGML_TYPE_I16}); },
     "f32, f16, bf16, i32 or i16"},
    {GGML_OP_FLASH_ATTN_EXT, attends, "an f32 query, K and V of real numbers, f32 sinks"},
    {GGML_OP_SET_ROWS, real_numbers, "f32 or f16"},
    {GGML_OP_CPY, converts, "types that convert"},
    {GGML_OP_DUP, converts, "types that convert"},
    {GGML_OP_CONT, converts, "types that convert"},
};

std::string described(node t) {
    std::string found = std::string("ggml cannot compute ") + ggml_op_desc(t) + " '" + t->name + "' of";
    for (node source : t->src) {
        if (source) {
            found += std::string(" '") + source->name + "' (" + ggml_type_name(source->type) + ")";
        }
    }
    return found;
}

std::string why_not(ggml_cgraph *graph) {
    for (int i = 0; graph && i < ggml_graph_n_nodes(graph); i++) {
        node t = ggml_graph_node(graph, i);
        if (ggml_is_empty(t)) {
            continue;  // nothing is computed
        }
        for (const auto &rule : rules) {
            if (rule.op == t->op && !rule.computable(t)) {
                return described(t) + ": it needs " + rule.wants;
            }
        }
    }
    return "";
}

}  // namespace

std::string why_not_computable(llama_context *context) {
    const uint32_t n_seqs = llama_n_seq_max(context);
    const uint32_t n_tokens = std::min(llama_n_ctx(context), llama_n_ubatch(context));
    // As libllama itself does when it makes a context, and in its order: the larger graph last, so that its
    // memory stays reserved.
    std::string reason = why_not(llama_graph_reserve(context, n_seqs, n_seqs, n_seqs));
    return reason.empty() ? why_not(llama_graph_reserve(context, n_tokens, n_seqs, n_tokens)) : reason;
}
