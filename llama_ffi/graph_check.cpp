// Checks a model's graph before the first computation. If ggml does not support the types or parameters of an
// operation, a computation fails an assertion, or calls a missing function, on all of its threads at once. The process
// cannot survive that. This check finds such operations on one thread, when a context is created.
//
// The rules are those of ggml's CPU backend, which computes every operation that no other backend takes. ggml itself
// checks shapes while it builds the graph, on the calling thread, where a failed assertion becomes an exception.
#include "graph_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "ggml.h"
#include "llama.h"

// libllama exports this function, but its header, llama-ext.h, is not installed.
LLAMA_API struct ggml_cgraph *llama_graph_reserve(struct llama_context *ctx, uint32_t n_tokens, uint32_t n_seqs,
                                                  uint32_t n_outputs);

namespace {

using node = const ggml_tensor *;

bool is(node t, std::initializer_list<ggml_type> types) {
    return t && std::find(types.begin(), types.end(), t->type) != types.end();
}

// Q8_1 and Q8_K hold intermediate results. ggml cannot multiply weights of these types.
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

// f32 with f32; f16 or bf16 with f32 or with the same type.
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
    // Sections exist for positions with several parts.
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
    const char *requirement;
} rules[] = {
    {GGML_OP_MUL_MAT, multiplies, "weights of real numbers"},
    {GGML_OP_MUL_MAT_ID, multiplies, "weights of real numbers"},
    {GGML_OP_GET_ROWS, picks_rows, "rows of real numbers or of i32"},
    {GGML_OP_ADD, adds, "two f32 operands"},
    {GGML_OP_SUB, combines, "two f32 operands"},
    {GGML_OP_MUL, combines, "two f32 operands"},
    {GGML_OP_DIV, combines, "two f32 operands"},
    {GGML_OP_ADD_ID, all_f32, "f32 operands"},
    {GGML_OP_NORM, normalizes, "f32, and a finite epsilon that is not negative"},
    {GGML_OP_RMS_NORM, normalizes, "f32, and a finite epsilon that is not negative"},
    {GGML_OP_L2_NORM, normalizes, "f32, and a finite epsilon that is not negative"},
    {GGML_OP_GROUP_NORM, normalizes, "f32, groups, and a finite epsilon that is not negative"},
    {GGML_OP_ROPE, rotates, "an even number of dimensions within a head, sections within them, and f32 factors"},
    {GGML_OP_SOFT_MAX, [](node t) { return is(t->src[0], {GGML_TYPE_F32}) && (!t->src[2] || is(t->src[2], {GGML_TYPE_F32})); },
     "f32 operands"},
    {GGML_OP_SCALE, scales, "f32 operands"},
    {GGML_OP_SSM_CONV, all_f32, "f32 operands"},
    {GGML_OP_SSM_SCAN, scans, "f32 operands, and a number of heads that is a multiple of the groups"},
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
    {GGML_OP_GLU, gates, "f32 or f16, the same for both"},
    {GGML_OP_ARGSORT, all_f32, "f32 operands"},
    {GGML_OP_TOP_K, all_f32, "f32 operands"},
    {GGML_OP_PAD, all_f32, "f32 operands"},
    {GGML_OP_ROLL, all_f32, "f32 operands"},
    {GGML_OP_REPEAT, [](node t) { return is(t->src[0], {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_I32, GGML_TYPE_I16}); },
     "f32, f16, bf16, i32 or i16"},
    {GGML_OP_FLASH_ATTN_EXT, attends, "an f32 query, K and V of real numbers, f32 sinks"},
    {GGML_OP_SET_ROWS, real_numbers, "f32 or f16"},
    {GGML_OP_CPY, converts, "convertible types"},
    {GGML_OP_DUP, converts, "convertible types"},
    {GGML_OP_CONT, converts, "convertible types"},
};

std::string describe(node t) {
    std::string text = std::string("ggml cannot compute ") + ggml_op_desc(t) + " '" + t->name + "' of";
    for (node source : t->src) {
        if (source) {
            text += std::string(" '") + source->name + "' (" + ggml_type_name(source->type) + ")";
        }
    }
    return text;
}

std::string first_problem(ggml_cgraph *graph) {
    for (int i = 0; graph && i < ggml_graph_n_nodes(graph); i++) {
        node t = ggml_graph_node(graph, i);
        if (ggml_is_empty(t)) {
            continue;  // no element to compute
        }
        for (const auto &rule : rules) {
            if (rule.op == t->op && !rule.computable(t)) {
                return describe(t) + ": it needs " + rule.requirement;
            }
        }
    }
    return "";
}

}  // namespace

std::string graph_problem(llama_context *context) {
    const uint32_t n_seqs = llama_n_seq_max(context);
    const uint32_t n_tokens = std::min(llama_n_ctx(context), llama_n_ubatch(context));
    // libllama reserves the same graphs in the same order when it creates a context. The larger graph comes last, so
    // that its memory stays reserved.
    std::string reason = first_problem(llama_graph_reserve(context, n_seqs, n_seqs, n_seqs));
    return reason.empty() ? first_problem(llama_graph_reserve(context, n_tokens, n_seqs, n_tokens)) : reason;
}
