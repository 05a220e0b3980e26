// One token of one sequence through a whole Llama-like model, stage by stage, on weights and caches that others own.
#include <torch/custom_class.h>

#include <chrono>

#include "attention.h"
#include "checks.h"
#include "matrix.h"

namespace dynact {
namespace {

enum Part { kQ, kK, kV, kO, kGate, kUp, kDown, kHead };

int64_t part_of(std::string_view name) {
  constexpr std::string_view names[] = {"q", "k", "v", "o", "gate", "up", "down", "head"};
  for (int64_t i = 0; i < 8; ++i)
    if (names[i] == name) return i;
  TORCH_CHECK_VALUE(false, "a projection is one of q, k, v, o, gate, up, down, head; got ", name);
}

// A copy of gate and up in few bits whose product says which neurons run.
struct Guess {
  Matrix parts[2];  // gate, up
  Tensor scale[2], bias[2], limit;  // fp32 [neurons], of the outputs; what |up * act(gate)| must exceed, 0-d or [neurons]
  Tensor chosen;  // int32 [neurons], as many as were
};

struct Layer {
  Matrix parts[7];
  std::optional<Guess> guess;
  Matrix turn[2];  // of what a norm gives, if it has inputs
  Tensor norm[2];
  double eps[2];
  Tensor heads, neurons, gate_limit;  // kept heads and neurons, int32; CATS' threshold on the activated gate
  Tensor keys, values, length;
  float cut = 0.0f;
  bool relu_on_up = false;
};

// Whether other threads help with a step. On a machine that others share they may make it slower, so both ways are
// timed: in turns at first, then the slower one again now and then.
class Helpers {
 public:
  std::optional<bool> asked;

  void begin() {
    help_ = asked.value_or(choose());
    next_ = 0, start_ = Clock::now();
  }
  bool help() const { return asked.value_or(help_); }

  // Stages `from` to `to` have run; a step counts if all of its stages ran in order.
  void ran(int64_t from, int64_t to, int64_t all) {
    next_ = from == next_ ? to : -1;
    if (next_ != all || asked) return;
    const double own = std::chrono::duration<double>(Clock::now() - start_).count();
    double& usual = usual_[help_];
    usual = counts_[help_]++ ? usual + (own - usual) / 4 : own;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kTrials = 4, kAgain = 64;  // steps each way at first; steps until the slower way has a turn

  bool choose() {
    const int64_t n = counts_[0] + counts_[1];
    if (n < 2 * kTrials) return n % 2;
    return (usual_[1] < usual_[0]) != (n % kAgain == 0);
  }

  bool help_ = false;
  int64_t next_ = 0, counts_[2] = {0, 0};
  double usual_[2] = {0.0, 0.0};
  Clock::time_point start_;
};

Tensor floats_of(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

class Step : public torch::CustomClassHolder {
 public:
  static constexpr int64_t kStages = 7;  // of a layer: norm, attention, o, norm, gate, up, down

  Step(std::vector<int64_t> sizes, std::string act, bool bf16_values, double scale)
      : act_(parse_act(act)), narrow_(bf16_values), factor_(static_cast<float>(scale)) {
    TORCH_CHECK(sizes.size() == 5, "Step needs layers, heads, KV groups, the size of a head, neurons");
    layers_.resize(sizes[0]);
    heads_ = sizes[1], groups_ = sizes[2], size_ = sizes[3], neurons_ = sizes[4];
    auto options = at::TensorOptions().dtype(at::kFloat);
    q_ = at::empty({heads_ * size_}, options);
    attended_ = at::empty({heads_ * size_}, options);
    gate_ = at::empty({neurons_}, options);
    hidden_ = at::empty({neurons_}, options);
  }

  void set_norms(int64_t layer, const Tensor& first, double eps1, const Tensor& second, double eps2) {
    Layer& l = at(layer);
    l.norm[0] = floats_of(first), l.norm[1] = floats_of(second);
    l.eps[0] = eps1, l.eps[1] = eps2;
  }

  void set_final_norm(const Tensor& weight, double eps) {
    final_ = floats_of(weight), final_eps_ = eps;
    auto options = at::TensorOptions().dtype(at::kFloat);
    residual_ = at::empty({weight.numel()}, options);
    x_ = at::empty({weight.numel()}, options);
  }

  // weight: [N, K], or [K, N] where columns, of the step's type.
  void set_weight(int64_t layer, std::string name, const Tensor& weight, bool columns, const OptTensor& bias) {
    TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "a weight must be a contiguous matrix");
    TORCH_CHECK(weight.scalar_type() == (narrow_ ? at::kBFloat16 : at::kFloat), "the weight of ", name, " is ",
                weight.scalar_type(), ", the step is not");
    Matrix& m = matrix(layer, name);
    m.weight = weight, m.columns = columns, m.packed.reset();
    m.inputs = weight.size(columns ? 0 : 1), m.outputs = weight.size(columns ? 1 : 0);
    m.bias = bias ? floats_of(*bias) : Tensor();
  }

  // codes, peaks: as kernels.lowbit packs them; width: weights of a line.
  void set_packed(int64_t layer, std::string name, const Tensor& codes, const Tensor& peaks, int64_t bits,
                  int64_t width, bool columns, const OptTensor& bias) {
    Matrix& m = matrix(layer, name);
    m.packed = Packed(codes, peaks, bits, width);
    m.columns = columns, m.weight = Tensor();
    m.inputs = columns ? m.packed->lines : width;
    m.outputs = columns ? m.packed->panels * width : m.packed->lines;
    m.bias = bias ? floats_of(*bias) : Tensor();
  }

  // The projection's inputs less a number.
  void set_centre(int64_t layer, std::string name, double centre) {
    matrix(layer, name).centre = static_cast<float>(centre);
  }

  // into [r, K], out [r, N], of the step's type: x into^T out joins the projection's output.
  void set_low_rank(int64_t layer, std::string name, const Tensor& into, const Tensor& out) {
    Matrix& m = matrix(layer, name);
    TORCH_CHECK(into.dim() == 2 && out.dim() == 2 && into.size(0) == out.size(0) && into.size(1) == m.inputs &&
                    out.size(1) == m.outputs && into.is_contiguous() && out.is_contiguous(),
                "the low-rank part of ", name, " is [r, ", m.inputs, "] and [r, ", m.outputs, "], contiguous");
    for (const Tensor* part : {&into, &out})
      TORCH_CHECK(part->scalar_type() == (narrow_ ? at::kBFloat16 : at::kFloat), "the low-rank part of ", name, " is ",
                  part->scalar_type(), ", the step is not");
    m.into = into, m.out = out;
  }

  void set_limit(int64_t layer, std::string name, const OptTensor& t) {
    Tensor& to = name == "neurons" ? at(layer).gate_limit : matrix(layer, name).limit;
    to = t ? floats_of(*t) : Tensor();
    if (t) check_threshold(to, name == "neurons" ? neurons_ : matrix(layer, name).inputs, "set_limit");
  }

  // Keep the k channels of largest |x|, or |x| * worth [K]; 0: all.
  void set_top(int64_t layer, std::string name, int64_t k, const OptTensor& worth) {
    Matrix& m = matrix(layer, name);
    TORCH_CHECK_VALUE(0 <= k && k <= m.inputs, "set_top: k must be in 0..", m.inputs, ", got ", k);
    m.top = k, m.worth = worth ? floats_of(*worth) : Tensor();
    if (worth) TORCH_CHECK(m.worth.dim() == 1 && m.worth.numel() == m.inputs, "set_top: worth must be [", m.inputs, "]");
  }

  void set_index(int64_t layer, std::string name, const OptTensor& idx) {
    if (name == "neurons" || name == "heads") {
      Layer& l = at(layer);
      (name == "heads" ? l.heads : l.neurons) =
          idx ? checked_index(*idx, name == "heads" ? heads_ : neurons_, "set_index") : Tensor();
      return;
    }
    Matrix& m = matrix(layer, name);
    m.index = idx ? checked_index(*idx, m.inputs, "set_index") : Tensor();
  }

  // Neurons are chosen by a copy: codes by input channel (as kernels.lowbit packs them), scale and bias of its outputs,
  // gate's before up's; of the inputs what exceeds `cut` is read.
  void set_guess(int64_t layer, std::vector<Tensor> codes, std::vector<Tensor> peaks, int64_t bits,
                 std::vector<Tensor> scales, std::vector<OptTensor> biases, double cut, const Tensor& limit) {
    TORCH_CHECK(codes.size() == 2 && peaks.size() == 2 && scales.size() == 2 && biases.size() == 2,
                "a guess needs gate and up");
    Guess g;
    for (int i = 0; i < 2; ++i) {
      Matrix& m = g.parts[i];
      m.packed = Packed(codes[i], peaks[i], bits, neurons_);
      m.columns = true, m.inputs = m.packed->lines, m.outputs = neurons_;
      TORCH_CHECK(m.packed->panels == 1 && m.inputs == x_.numel(), "a guess reads the MLP's input");
      m.limit = at::empty({}, at::TensorOptions().dtype(at::kFloat)).fill_(cut);
      g.scale[i] = floats_of(scales[i]), g.bias[i] = biases[i] ? floats_of(*biases[i]) : Tensor();
      TORCH_CHECK(g.scale[i].numel() == neurons_ && (!biases[i] || g.bias[i].numel() == neurons_),
                  "scales and biases of a guess are [", neurons_, "]");
    }
    g.limit = floats_of(limit);
    check_threshold(g.limit, neurons_, "set_guess");
    g.chosen = at::empty({neurons_}, at::TensorOptions().dtype(at::kInt));
    at(layer).guess = std::move(g);
  }

  // A ReLU keeps what is above `cut` (FATReLU), up passes one of its own (dReLU).
  void set_cut(int64_t layer, double cut, bool relu_on_up) {
    at(layer).cut = static_cast<float>(cut), at(layer).relu_on_up = relu_on_up;
  }

  // cos, sin: [positions, size of a head].
  void set_rotary(const Tensor& cos, const Tensor& sin) { cos_ = floats_of(cos), sin_ = floats_of(sin); }

  // keys, values: [1, G, S, D] of the step's type; lengths: int64, how many entries are filled, counted up here.
  void set_cache(std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<Tensor> lengths) {
    TORCH_CHECK(keys.size() == layers_.size() && values.size() == layers_.size() && lengths.size() == layers_.size(),
                "a cache has one layer for each of the model's");
    for (size_t i = 0; i < layers_.size(); ++i) {
      TORCH_CHECK(keys[i].is_contiguous() && values[i].sizes() == keys[i].sizes() && values[i].is_contiguous() &&
                      keys[i].dim() == 4 && keys[i].size(0) == 1 && keys[i].size(1) == groups_ &&
                      keys[i].size(3) == size_ &&
                      keys[i].scalar_type() == (narrow_ ? at::kBFloat16 : at::kFloat) &&
                      values[i].scalar_type() == keys[i].scalar_type() && lengths[i].scalar_type() == at::kLong,
                  "cache layer ", i, " is not the step's");
      layers_[i].keys = keys[i], layers_[i].values = values[i], layers_[i].length = lengths[i];
    }
  }

  // The residual stream becomes a row [d_model].
  void begin(const Tensor& row) {
    TORCH_CHECK(row.numel() == residual_.numel(), "the residual stream has ", residual_.numel(), " channels");
    residual_.copy_(row.reshape({-1}));
    helpers_.begin();
  }

  // Whether other threads help: by what was faster so far (nullopt), always, or never. Results do not depend on it.
  void set_help(std::optional<bool> help) { helpers_.asked = help; }
  bool helped() const { return helpers_.help(); }

  // Stages `from` to `to`, kStages a layer; then the final norm and the head.
  void run(int64_t from, int64_t to) {
    TORCH_CHECK_INDEX(0 <= from && to <= stages(), "stages lie in [0, ", stages(), "]");
    {
      Pool::Team team(at::get_num_threads(), helpers_.help());
      for (int64_t s = from; s < to; ++s) narrow_ ? stage<bf16>(s) : stage<float>(s);
    }
    helpers_.ran(from, to, stages());
  }

  int64_t stages() const { return kStages * static_cast<int64_t>(layers_.size()) + 2; }

  Tensor buffer(std::string name) const {
    if (name == "residual") return residual_;
    if (name == "normed") return x_;
    if (name == "attended") return attended_;
    if (name == "gate") return gate_;
    if (name == "hidden") return hidden_;
    TORCH_CHECK_VALUE(name == "logits", "no buffer is called ", name);
    return logits_;
  }

 private:
  Layer& at(int64_t layer) { return layers_.at(layer); }

  Matrix& matrix(int64_t layer, std::string_view name) {
    if (name == "attn_in" || name == "mlp_in") return at(layer).turn[name == "mlp_in"];
    const int64_t part = part_of(name);
    return part == kHead ? head_ : at(layer).parts[part];
  }

  template <typename T>
  void stage(int64_t s) {
    const int64_t layer = s / kStages;
    if (layer == static_cast<int64_t>(layers_.size())) {
      if (s % kStages == 0) return norm<T>(final_, final_eps_, {});
      logits_ = at::empty({1, 1, head_.outputs}, at::TensorOptions().dtype(narrow_ ? at::kBFloat16 : at::kFloat));
      float* y = narrow_ ? room(logit_sums_, head_.outputs) : logits_.mutable_data_ptr<float>();
      head_.apply<T>(data<float>(x_), y);
      if (narrow_) kernels<bf16>().from_float(y, head_.outputs, static_cast<bf16*>(logits_.mutable_data_ptr()));
      return;
    }
    Layer& l = layers_[layer];
    switch (s % kStages) {
      case 0: return norm<T>(l.norm[0], l.eps[0], l.turn[0]);
      case 1: return attention<T>(l);
      case 2: return add<T>(l.parts[kO], data<float>(attended_));
      case 3: return norm<T>(l.norm[1], l.eps[1], l.turn[1]);
      case 4: return gate<T>(l);
      case 5: return up<T>(l);
      case 6: return add<T>(l.parts[kDown], data<float>(hidden_));
    }
  }

  template <typename T>
  static float once(float v) {  // v as the module would have stored it
    if constexpr (std::is_same_v<T, float>) return v;
    kernels<T>().round(&v, 1);
    return v;
  }

  template <typename T>
  void norm(const Tensor& weight, double eps, const Matrix& turn) {
    const float *h = data<float>(residual_), *w = data<float>(weight);
    float* x = x_.mutable_data_ptr<float>();
    const int64_t n = x_.numel();
    float parts[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; ++j) parts[j] += h[i + j] * h[i + j];
    double sum = 0.0;
    for (float part : parts) sum += part;
    for (; i < n; ++i) sum += h[i] * h[i];
    const float r = 1.0f / std::sqrt(static_cast<float>(sum / static_cast<double>(n)) + static_cast<float>(eps));
    for (int64_t j = 0; j < n; ++j) x[j] = h[j] * r;
    kernels<T>().round(x, n);
    for (int64_t j = 0; j < n; ++j) x[j] *= w[j];
    kernels<T>().round(x, n);
    if (!turn.inputs) return;
    float* y = room(sums_, n);
    turn.apply<T>(x, y);
    kernels<T>().round(y, n);
    std::copy(y, y + n, x);
  }

  // The projection's output joins the residual stream.
  template <typename T>
  void add(const Matrix& m, const float* x) {
    float *h = residual_.mutable_data_ptr<float>(), *y = room(sums_, m.outputs);
    m.apply<T>(x, y);
    kernels<T>().round(y, m.outputs);
    for (int64_t i = 0; i < m.outputs; ++i) h[i] += y[i];
    kernels<T>().round(h, m.outputs);
  }

  // x = x * cos + rotate_half(x) * sin, each product and the sum rounded.
  template <typename T>
  void rotate(float* x, int64_t position) {
    const float *c = data<float>(cos_) + position * size_, *s = data<float>(sin_) + position * size_;
    const int64_t half = size_ / 2;
    float* t = room(turned_, 2 * size_);
    for (int64_t i = 0; i < half; ++i) {
      t[i] = x[i] * c[i], t[half + i] = x[half + i] * c[half + i];
      t[size_ + i] = -x[half + i] * s[i], t[size_ + half + i] = x[i] * s[half + i];
    }
    kernels<T>().round(t, 2 * size_);
    for (int64_t i = 0; i < size_; ++i) x[i] = t[i] + t[size_ + i];
    kernels<T>().round(x, size_);
  }

  template <typename T>
  void attention(Layer& l) {
    TORCH_CHECK(l.keys.defined(), "the step has no cache");
    const float* x = data<float>(x_);
    const int64_t position = *l.length.const_data_ptr<int64_t>(), capacity = l.keys.size(2), D = size_;
    TORCH_CHECK_INDEX(position < capacity && position < cos_.size(0), "the cache is full at ", position, " tokens");
    float *q = q_.mutable_data_ptr<float>(), *kv = room(sums_, groups_ * D);
    T *keys = static_cast<T*>(l.keys.mutable_data_ptr()), *values = static_cast<T*>(l.values.mutable_data_ptr());
    const int32_t* kept = l.heads.defined() ? l.heads.const_data_ptr<int32_t>() : nullptr;
    const int64_t n = kept ? l.heads.numel() : heads_;
    if (kept && !l.parts[kQ].columns) {
      int32_t* list = room(rows_, n * D);
      for (int64_t j = 0; j < n * D; ++j) list[j] = kept[j / D] * static_cast<int32_t>(D) + static_cast<int32_t>(j % D);
      float* some = room(scratch().y, n * D);
      l.parts[kQ].some<T>(x, list, n * D, some);
      for (int64_t j = 0; j < n * D; ++j) q[list[j]] = some[j];
    } else {
      l.parts[kQ].apply<T>(x, q);
    }
    for (int64_t j = 0; j < n; ++j) {
      float* head = q + (kept ? kept[j] : j) * D;
      kernels<T>().round(head, D);
      rotate<T>(head, position);
    }
    for (bool key : {true, false}) {
      l.parts[key ? kK : kV].apply<T>(x, kv);
      kernels<T>().round(kv, groups_ * D);
      for (int64_t g = 0; g < groups_; ++g) {
        if (key) rotate<T>(kv + g * D, position);
        kernels<T>().from_float(kv + g * D, D, (key ? keys : values) + (g * capacity + position) * D);
      }
    }
    float* y = attended_.mutable_data_ptr<float>();
    if (kept) std::fill(y, y + heads_ * D, 0.0f);
    const int64_t bytes = 2 * n * position * D * static_cast<int64_t>(sizeof(T));
    split(n, bytes, [&](int64_t a, int64_t b) {
      for (int64_t j = a; j < b; ++j) {
        const int64_t h = kept ? kept[j] : j, g = h / (heads_ / groups_);
        attend_head(q + h * D, keys + g * capacity * D, values + g * capacity * D, D, nullptr, position + 1, factor_, 0,
                    y + h * D);
        kernels<T>().round(y + h * D, D);
      }
    });
    ++*l.length.mutable_data_ptr<int64_t>();
  }

  template <typename T>
  void choose(Layer& l) {
    Guess& guess = *l.guess;
    float* y[2];
    for (int i = 0; i < 2; ++i) {
      y[i] = room(guessed_[i], neurons_);
      guess.parts[i].apply<T>(data<float>(x_), y[i]);
      const float* scale = data<float>(guess.scale[i]);
      const float* bias = guess.bias[i].defined() ? data<float>(guess.bias[i]) : nullptr;
      for (int64_t j = 0; j < neurons_; ++j) y[i][j] = y[i][j] * scale[j] + (bias ? bias[j] : 0.0f);
      kernels<T>().round(y[i], neurons_);
    }
    kernels<T>().glu(y[0], nullptr, neurons_, act_, y[0]);
    for (int64_t j = 0; j < neurons_; ++j) y[0][j] *= y[1][j];
    kernels<T>().round(y[0], neurons_);
    const float* limit = data<float>(guess.limit);
    const bool own = guess.limit.dim() > 0;
    int32_t* list = guess.chosen.mutable_data_ptr<int32_t>();
    int64_t m = 0;
    for (int64_t j = 0; j < neurons_; ++j)
      if (!(std::abs(y[0][j]) <= limit[own ? j : 0])) list[m++] = static_cast<int32_t>(j);
    l.neurons = guess.chosen.narrow(0, 0, m);
  }

  template <typename T>
  void gate(Layer& l) {
    if (l.guess) choose<T>(l);
    const float* x = data<float>(x_);
    float* g = gate_.mutable_data_ptr<float>();
    if (!l.neurons.defined() || l.parts[kGate].columns) {
      l.parts[kGate].apply<T>(x, g);
      return activate<T>(l, g, neurons_);
    }
    const int32_t* list = l.neurons.const_data_ptr<int32_t>();
    const int64_t m = l.neurons.numel();
    float* some = room(scratch().gate, m);
    l.parts[kGate].some<T>(x, list, m, some);
    activate<T>(l, some, m);
    for (int64_t j = 0; j < m; ++j) g[list[j]] = some[j];
  }

  template <typename T>
  void activate(const Layer& l, float* g, int64_t n) {
    kernels<T>().round(g, n);
    if (l.cut > 0.0f)
      for (int64_t i = 0; i < n; ++i) g[i] = g[i] <= l.cut ? 0.0f : g[i];
    kernels<T>().glu(g, nullptr, n, act_, g);
  }

  static void rectify(const Layer& l, float* up, int64_t n) {
    if (l.relu_on_up)
      for (int64_t i = 0; i < n; ++i) up[i] = up[i] < 0.0f ? 0.0f : up[i];  // a NaN stays
  }

  template <typename T>
  void up(Layer& l) {
    const float* x = data<float>(x_);
    float *g = gate_.mutable_data_ptr<float>(), *y = hidden_.mutable_data_ptr<float>();
    const int32_t* list = nullptr;
    int64_t m = 0;
    if (l.neurons.defined()) {
      list = l.neurons.const_data_ptr<int32_t>(), m = l.neurons.numel();
    } else if (l.gate_limit.defined()) {
      Channels kept = select(g, l.gate_limit, neurons_);
      int32_t* own = room(rows_, kept.m);
      std::copy(kept.idx, kept.idx + kept.m, own);
      list = own, m = kept.m;
    }
    if (!list) {
      l.parts[kUp].apply<T>(x, y);
      rectify(l, y, neurons_);
      kernels<T>().round(y, neurons_);
      for (int64_t i = 0; i < neurons_; ++i) y[i] *= g[i];
      return kernels<T>().round(y, neurons_);
    }
    float* some = room(scratch().up, std::max(m, neurons_));
    const bool by_rows = !l.parts[kUp].columns;
    if (by_rows)
      l.parts[kUp].some<T>(x, list, m, some);
    else
      l.parts[kUp].apply<T>(x, some);
    rectify(l, some, by_rows ? m : neurons_);
    kernels<T>().round(some, by_rows ? m : neurons_);
    std::fill(y, y + neurons_, 0.0f);
    for (int64_t j = 0; j < m; ++j) y[list[j]] = g[list[j]] * some[by_rows ? j : list[j]];
    kernels<T>().round(y, neurons_);
  }

  std::vector<Layer> layers_;
  Matrix head_;
  Helpers helpers_;
  Tensor final_, cos_, sin_;
  double final_eps_ = 0.0;
  Act act_;
  bool narrow_;
  float factor_;
  int64_t heads_, groups_, size_, neurons_;
  Tensor residual_, x_, q_, attended_, gate_, hidden_, logits_;  // fp32, values of the step's type; logits of that type
  std::vector<float> sums_, turned_, logit_sums_, guessed_[2];
  std::vector<int32_t> rows_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynact_cpu, m) {
  m.class_<Step>("Step")
      .def(torch::init<std::vector<int64_t>, std::string, bool, double>())
      .def("set_norms", &Step::set_norms)
      .def("set_final_norm", &Step::set_final_norm)
      .def("set_weight", &Step::set_weight)
      .def("set_packed", &Step::set_packed)
      .def("set_centre", &Step::set_centre)
      .def("set_low_rank", &Step::set_low_rank)
      .def("set_limit", &Step::set_limit)
      .def("set_top", &Step::set_top)
      .def("set_index", &Step::set_index)
      .def("set_guess", &Step::set_guess)
      .def("set_cut", &Step::set_cut)
      .def("set_rotary", &Step::set_rotary)
      .def("set_cache", &Step::set_cache)
      .def("set_help", &Step::set_help)
      .def("helped", &Step::helped)
      .def("begin", &Step::begin)
      .def("run", &Step::run)
      .def("stages", &Step::stages)
      .def("buffer", &Step::buffer);
}

}  // namespace dynact
