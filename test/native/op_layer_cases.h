// Cases for every operation that is neither a product, attention nor the optimizer.
#pragma once
#include <math.h>
#include <stdlib.h>

#include "kernels/reference/reference.h"
#include "op_case.h"

namespace tunemesh {

inline void require(TmStatus status, const Device& device) {
  if (status == TM_OK) return;
  printf("%s: status %d: %s\n", device.name.c_str(), status, device.backend->last_error());
  exit(1);
}

inline std::string named(const char* op, std::initializer_list<size_t> shape) {
  std::string name = op;
  for (size_t size : shape) name.append(" ").append(std::to_string(size));
  return name;
}

// Builds a case from one function per side; Reference is called with a double or a float.
template <typename Kernel, typename Reference>
inline OpCase make_case(std::string name, Kernel kernel, Reference reference) {
  return {std::move(name), kernel, [=] { return reference(double{}); },
          [=] { return reference(float{}); }};
}

inline OpCase embedding_case(Random random, size_t n, size_t c, size_t v) {
  const auto tokens = random.indices(n, v);
  const Floats table = random.normals(v * c, 1), dout = random.normals(n * c, 1);
  auto kernel = [=](const Device& d) {
    Floats out(n * c, kPoison), grad = table, gathered(n * c, kPoison), scattered = table;
    const auto& b = *d.backend;
    const TmWeight rows = {table.data(), nullptr, v, c};
    require(b.embedding_forward(d.context, tokens.data(), n, &rows, out.data()), d);
    require(b.embedding_backward_add(d.context, tokens.data(), n, dout.data(), c, v, grad.data()),
            d);
    require(b.gather_rows(d.context, table.data(), tokens.data(), n, c, gathered.data()), d);
    require(b.scatter_rows_add(d.context, dout.data(), tokens.data(), n, c, scattered.data()), d);
    return Outputs{out, grad, gathered, scattered};
  };
  return make_case(named("embedding, gather, scatter", {n, c, v}), kernel, [=](auto real) {
    using Real = decltype(real);
    auto weights = as<Real>(table), grad = as<Real>(table), rows = as<Real>(dout);
    std::vector<Real> out(n * c);
    reference::embedding_forward<Real>({tokens.data(), n, c, weights.data(), out.data()});
    reference::embedding_backward_add<Real>({tokens.data(), n, c, grad.data(), rows.data()});
    return Exact{exact(out), exact(grad), exact(out), exact(grad)};
  });
}

inline OpCase norm_case(Random random, size_t n, size_t c, size_t gap, bool dx_add) {
  const Matrix x = random_matrix(random, n, c, gap), dy = random_matrix(random, n, c, gap, 0.1);
  const Matrix dx = dx_add ? random_matrix(random, n, c, gap) : poisoned(x);
  const Floats gain = random.normals(c, 1), dgain = random.normals(c, 1);
  constexpr float kEpsilon = 1e-5f;
  auto kernel = [=](const Device& d) {
    Matrix y = poisoned(x), out = dx;
    Floats rstd(n, kPoison), dg = dgain;
    const TmRmsNorm forward = {x.values.data(), gain.data(), y.values.data(), rstd.data(), n, c,
                               x.stride,        y.stride,    kEpsilon,        0,           {}};
    require(d.backend->rms_norm_forward(d.context, &forward), d);
    const TmRmsNormBackward backward = {dy.values.data(),
                                        x.values.data(),
                                        gain.data(),
                                        rstd.data(),
                                        out.values.data(),
                                        dg.data(),
                                        n,
                                        c,
                                        x.stride,
                                        dy.stride,
                                        out.stride,
                                        dx_add,
                                        0,
                                        {}};
    require(d.backend->rms_norm_backward(d.context, &backward), d);
    return Outputs{y.values, rstd, out.values, dg};
  };
  return make_case(named("rms norm", {n, c, gap, dx_add}), kernel, [=](auto real) {
    using Real = decltype(real);
    auto xs = as<Real>(x.values), ys = as<Real>(poisoned(x).values), dys = as<Real>(dy.values);
    auto dxs = as<Real>(dx.values), g = as<Real>(gain), dg = as<Real>(dgain);
    std::vector<Real> rstd(n);
    reference::rms_norm_forward<Real>(
        {{xs.data(), x.stride}, {ys.data(), x.stride}, g.data(), rstd.data(), n, c, kEpsilon});
    reference::rms_norm_backward<Real>({{xs.data(), x.stride},
                                        {dys.data(), x.stride},
                                        {dxs.data(), x.stride},
                                        g.data(),
                                        rstd.data(),
                                        dg.data(),
                                        n,
                                        c,
                                        dx_add});
    return Exact{exact(ys), exact(rstd), exact(dxs), exact(dg)};
  });
}

inline OpCase bias_case(Random random, size_t n, size_t c, size_t gap) {
  const Matrix x = random_matrix(random, n, c, gap);
  const Floats bias = random.normals(c, 1), addend = random.normals(n * c, 1);
  auto kernel = [=](const Device& d) {
    Matrix y = x;
    Floats dbias = bias, sum = addend;
    require(d.backend->bias_add(d.context, y.values.data(), n, c, y.stride, bias.data()), d);
    require(d.backend->bias_grad_add(d.context, x.values.data(), n, c, x.stride, dbias.data()), d);
    require(d.backend->add(d.context, sum.data(), addend.data(), n * c), d);
    return Outputs{y.values, dbias, sum};
  };
  return make_case(named("bias, add", {n, c, gap}), kernel, [=](auto real) {
    using Real = decltype(real);
    auto y = as<Real>(x.values), dy = y, b = as<Real>(bias), db = b, sum = as<Real>(addend);
    reference::bias_add<Real>({{y.data(), x.stride}, b.data(), n, c});
    reference::bias_grad_add<Real>({{dy.data(), x.stride}, db.data(), n, c});
    for (Real& value : sum) value += value;
    return Exact{exact(y), exact(db), exact(sum)};
  });
}

inline OpCase rope_case(Random random, size_t heads, size_t size, size_t gap) {
  constexpr size_t kTokens = 37, kPositions = 50;
  const Matrix x = random_matrix(random, kTokens, heads * size, gap);
  const auto positions = random.indices(kTokens, kPositions);
  Floats cosine(kPositions * size / 2), sine(cosine.size());
  for (size_t i = 0; i < cosine.size(); ++i) {
    const double angle = 6.3 * random.uniform();
    cosine[i] = static_cast<float>(::cos(angle));
    sine[i] = static_cast<float>(::sin(angle));
  }
  auto kernel = [=](const Device& d) {
    Outputs outputs;
    for (int inverse : {0, 1}) {
      Matrix y = x;
      const TmRope args = {y.values.data(),
                           y.stride,
                           positions.data(),
                           cosine.data(),
                           sine.data(),
                           kTokens,
                           heads,
                           size,
                           inverse,
                           {},
                           0};
      require(d.backend->rope(d.context, &args), d);
      outputs.push_back(y.values);
    }
    return outputs;
  };
  return make_case(named("rope", {heads, size, gap}), kernel, [=](auto real) {
    using Real = decltype(real);
    auto c = as<Real>(cosine), s = as<Real>(sine);
    Exact outputs;
    for (bool inverse : {false, true}) {
      auto y = as<Real>(x.values);
      reference::rope<Real>({{y.data(), x.stride},
                             positions.data(),
                             c.data(),
                             s.data(),
                             kTokens,
                             heads,
                             size,
                             inverse});
      outputs.push_back(exact(y));
    }
    return outputs;
  });
}

inline OpCase swiglu_case(Random random, size_t n, size_t d_size, double deviation) {
  const Matrix gate = random_matrix(random, n, d_size, 3, deviation);
  const Matrix up = random_matrix(random, n, d_size, 3), dout = random_matrix(random, n, d_size, 5);
  auto kernel = [=](const Device& d) {
    Matrix out = poisoned(dout), again = out, dgate = gate, dup = up;
    const TmSwiGlu forward = {gate.values.data(),
                              up.values.data(),
                              out.values.data(),
                              n,
                              d_size,
                              gate.stride,
                              out.stride,
                              {}};
    require(d.backend->swiglu_forward(d.context, &forward), d);
    const TmSwiGluBackward backward = {dout.values.data(),
                                       dgate.values.data(),
                                       dup.values.data(),
                                       dgate.values.data(),
                                       dup.values.data(),
                                       again.values.data(),
                                       n,
                                       d_size,
                                       gate.stride,
                                       out.stride,
                                       {}};
    require(d.backend->swiglu_backward(d.context, &backward), d);
    return Outputs{out.values, again.values, dgate.values, dup.values};
  };
  return make_case(named("swiglu", {n, d_size, size_t(deviation)}), kernel, [=](auto real) {
    using Real = decltype(real);
    auto g = as<Real>(gate.values), u = as<Real>(up.values), dy = as<Real>(dout.values);
    auto out = as<Real>(poisoned(dout).values), dg = g, du = u;
    const reference::SwiGlu<Real> forward = {
        {g.data(), gate.stride}, {u.data(), up.stride}, {out.data(), dout.stride}, n, d_size};
    reference::swiglu_forward<Real>(forward);
    reference::swiglu_backward<Real>(
        {forward, {dy.data(), dout.stride}, {dg.data(), gate.stride}, {du.data(), up.stride}});
    return Exact{exact(out), exact(out), exact(dg), exact(du)};
  });
}

inline OpCase loss_case(Random random, size_t rows, size_t v, double deviation) {
  const Matrix logits = random_matrix(random, rows, v, 7, deviation);
  const auto targets = random.indices(rows, v);
  constexpr float kScale = 1.0f / 77;
  auto kernel = [=](const Device& d) {
    Matrix forward = logits, backward = logits;
    std::vector<double> losses(rows, kPoison), again(rows, kPoison);
    TmCrossEntropy args = {
        forward.values.data(), logits.stride, targets.data(), losses.data(), rows, v, kScale, 0};
    require(d.backend->cross_entropy(d.context, &args), d);
    args.logits = backward.values.data();
    args.row_losses = again.data();
    args.dlogits = 1;
    require(d.backend->cross_entropy(d.context, &args), d);
    if (losses != again) printf("loss differs with and without dlogits\n");
    return Outputs{forward.values, backward.values, Floats(losses.begin(), losses.end()),
                   Floats(again.begin(), again.end())};
  };
  return make_case(named("cross entropy", {rows, v, size_t(deviation)}), kernel, [=](auto real) {
    using Real = decltype(real);
    auto x = as<Real>(logits.values);
    std::vector<double> losses(rows);
    reference::cross_entropy<Real>(
        {{x.data(), logits.stride}, targets.data(), losses.data(), rows, v, kScale, true});
    return Exact{exact(as<Real>(logits.values)), exact(x), losses, losses};
  });
}

}  // namespace tunemesh
