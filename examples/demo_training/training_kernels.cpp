// Depthwise convolutions and GELU for training on one CPU core, channels last, bfloat16 in and out, float32 inside.
//
// A third of a step of this network goes into oneDNN's backward of depthwise convolutions, which are far from the machine's limits at
// these sizes. Every loop here runs over blocks of 16 channels, one vector register. training_kernels.py holds the autograd side.

#include <torch/extension.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kBlock = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4)));

inline float widen(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t narrow(float value) {  // round to nearest even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec load(const float* at) { return *reinterpret_cast<const Vec*>(at); }
inline void store(float* at, Vec value) { *reinterpret_cast<Vec*>(at) = value; }

const uint16_t* bits_of(const torch::Tensor& t) { return reinterpret_cast<const uint16_t*>(t.data_ptr<at::BFloat16>()); }
uint16_t* bits_of(torch::Tensor& t) { return reinterpret_cast<uint16_t*>(t.data_ptr<at::BFloat16>()); }

struct Geometry {
    int64_t batch, c_in, c_out, height, width, out_height, out_width, kernel, stride, pad, multiplier, lanes, row, plane;

    Geometry(const torch::Tensor& x, int64_t channels, int64_t k, int64_t s)
        : batch(x.size(0)), c_in(x.size(1)), c_out(channels), height(x.size(2)), width(x.size(3)),
          out_height((x.size(2) - 1) / s + 1), out_width((x.size(3) - 1) / s + 1), kernel(k), stride(s), pad(k / 2),
          multiplier(channels / x.size(1)), lanes((channels + kBlock - 1) / kBlock * kBlock),
          row((x.size(3) + 2 * pad) * lanes), plane((x.size(2) + 2 * pad) * row) {}

    // One picture, widened to float32 with a border of zeros; input channels are repeated once for each of their outputs.
    void read_padded(const uint16_t* x, float* padded) const {
        for (int64_t y = 0; y < height; ++y) {
            for (int64_t column = 0; column < width; ++column) {
                const uint16_t* from = x + (y * width + column) * c_in;
                float* to = padded + (y + pad) * row + (column + pad) * lanes;
                if (multiplier == 1) {
                    for (int64_t c = 0; c < c_in; ++c) to[c] = widen(from[c]);
                } else if (multiplier == 2) {
                    for (int64_t c = 0; c < c_in; ++c) to[2 * c] = to[2 * c + 1] = widen(from[c]);
                } else {
                    for (int64_t c = 0; c < c_out; ++c) to[c] = widen(from[c / multiplier]);
                }
            }
        }
    }

    // The inverse for gradients: crop, add up the outputs of each input channel, narrow.
    void write_cropped(const float* padded, uint16_t* x) const {
        for (int64_t y = 0; y < height; ++y) {
            for (int64_t column = 0; column < width; ++column) {
                const float* from = padded + (y + pad) * row + (column + pad) * lanes;
                uint16_t* to = x + (y * width + column) * c_in;
                if (multiplier == 1) {
                    for (int64_t c = 0; c < c_in; ++c) to[c] = narrow(from[c]);
                } else if (multiplier == 2) {
                    for (int64_t c = 0; c < c_in; ++c) to[c] = narrow(from[2 * c] + from[2 * c + 1]);
                } else {
                    for (int64_t c = 0; c < c_in; ++c) {
                        float sum = 0;
                        for (int64_t m = 0; m < multiplier; ++m) sum += from[c * multiplier + m];
                        to[c] = narrow(sum);
                    }
                }
            }
        }
    }
};

// Weight [c_out, 1, k, k] -> [k * k, lanes].
std::vector<float> arrange(const torch::Tensor& weight, const Geometry& g) {
    std::vector<float> out(g.kernel * g.kernel * g.lanes, 0.0f);
    const float* from = weight.data_ptr<float>();
    for (int64_t c = 0; c < g.c_out; ++c)
        for (int64_t tap = 0; tap < g.kernel * g.kernel; ++tap) out[tap * g.lanes + c] = from[c * g.kernel * g.kernel + tap];
    return out;
}

template <int K>
void forward_picture(const Geometry& g, const float* padded, const float* weight, float* out_row, uint16_t* y) {
    constexpr int kTile = 4;  // neighbouring outputs share the loads of the weight
    for (int64_t oy = 0; oy < g.out_height; ++oy) {
        for (int64_t c = 0; c < g.lanes; c += kBlock) {
            const float* base = padded + oy * g.stride * g.row + c;
            int64_t ox = 0;
            for (; ox + kTile <= g.out_width; ox += kTile) {
                Vec sum[kTile] = {};
                for (int ky = 0; ky < K; ++ky) {
                    const float* at = base + ky * g.row + ox * g.stride * g.lanes;
#pragma GCC unroll 7
                    for (int kx = 0; kx < K; ++kx) {
                        const Vec w = load(weight + (ky * K + kx) * g.lanes + c);
#pragma GCC unroll 4
                        for (int t = 0; t < kTile; ++t) sum[t] += w * load(at + (t * g.stride + kx) * g.lanes);
                    }
                }
                for (int t = 0; t < kTile; ++t) store(out_row + (ox + t) * g.lanes + c, sum[t]);
            }
            for (; ox < g.out_width; ++ox) {
                Vec sum = {};
                for (int ky = 0; ky < K; ++ky)
                    for (int kx = 0; kx < K; ++kx)
                        sum += load(weight + (ky * K + kx) * g.lanes + c) * load(base + ky * g.row + (ox * g.stride + kx) * g.lanes);
                store(out_row + ox * g.lanes + c, sum);
            }
        }
        for (int64_t ox = 0; ox < g.out_width; ++ox)
            for (int64_t c = 0; c < g.c_out; ++c) y[(oy * g.out_width + ox) * g.c_out + c] = narrow(out_row[ox * g.lanes + c]);
    }
}

template <int K>
void backward_picture(const Geometry& g, const float* padded, const float* weight, const float* grad, float* grad_padded,
                      float* grad_weight) {
    for (int64_t c = 0; c < g.lanes; c += kBlock) {
        for (int ky = 0; ky < K; ++ky) {
            Vec sum[K] = {};
            Vec w[K];
            for (int kx = 0; kx < K; ++kx) w[kx] = load(weight + (ky * K + kx) * g.lanes + c);
            for (int64_t oy = 0; oy < g.out_height; ++oy) {
                const float* g_at = grad + oy * g.out_width * g.lanes + c;
                const int64_t offset = (oy * g.stride + ky) * g.row + c;
                const float* x_at = padded + offset;
                float* gx_at = grad_padded + offset;
                for (int64_t ox = 0; ox < g.out_width; ++ox) {
                    const Vec gradient = load(g_at + ox * g.lanes);
#pragma GCC unroll 7
                    for (int kx = 0; kx < K; ++kx) {
                        const int64_t at = (ox * g.stride + kx) * g.lanes;
                        sum[kx] += gradient * load(x_at + at);
                        store(gx_at + at, load(gx_at + at) + gradient * w[kx]);
                    }
                }
            }
            for (int kx = 0; kx < K; ++kx) {
                float* to = grad_weight + (ky * K + kx) * g.lanes + c;
                store(to, load(to) + sum[kx]);
            }
        }
    }
}

torch::Tensor depthwise_forward(const torch::Tensor& x, const torch::Tensor& weight, int64_t stride) {
    const Geometry g(x, weight.size(0), weight.size(2), stride);
    auto y = torch::empty({g.batch, g.c_out, g.out_height, g.out_width}, x.options(), torch::MemoryFormat::ChannelsLast);
    const auto taps = arrange(weight, g);
    std::vector<float> padded(g.plane, 0.0f), out_row(g.out_width * g.lanes);
    for (int64_t n = 0; n < g.batch; ++n) {
        g.read_padded(bits_of(x) + n * g.height * g.width * g.c_in, padded.data());
        uint16_t* out = bits_of(y) + n * g.out_height * g.out_width * g.c_out;
        if (g.kernel == 3) forward_picture<3>(g, padded.data(), taps.data(), out_row.data(), out);
        else forward_picture<7>(g, padded.data(), taps.data(), out_row.data(), out);
    }
    return y;
}

std::vector<torch::Tensor> depthwise_backward(const torch::Tensor& grad, const torch::Tensor& x, const torch::Tensor& weight,
                                              int64_t stride) {
    const Geometry g(x, weight.size(0), weight.size(2), stride);
    auto grad_x = torch::empty_like(x);
    auto grad_weight = torch::empty_like(weight);
    const auto taps = arrange(weight, g);
    std::vector<float> padded(g.plane, 0.0f), grad_padded(g.plane), gradient(g.out_height * g.out_width * g.lanes, 0.0f);
    std::vector<float> sums(taps.size(), 0.0f);
    for (int64_t n = 0; n < g.batch; ++n) {
        g.read_padded(bits_of(x) + n * g.height * g.width * g.c_in, padded.data());
        const uint16_t* from = bits_of(grad) + n * g.out_height * g.out_width * g.c_out;
        for (int64_t at = 0; at < g.out_height * g.out_width; ++at)
            for (int64_t c = 0; c < g.c_out; ++c) gradient[at * g.lanes + c] = widen(from[at * g.c_out + c]);
        std::memset(grad_padded.data(), 0, g.plane * sizeof(float));
        if (g.kernel == 3) backward_picture<3>(g, padded.data(), taps.data(), gradient.data(), grad_padded.data(), sums.data());
        else backward_picture<7>(g, padded.data(), taps.data(), gradient.data(), grad_padded.data(), sums.data());
        g.write_cropped(grad_padded.data(), bits_of(grad_x) + n * g.height * g.width * g.c_in);
    }
    float* to = grad_weight.data_ptr<float>();
    const int64_t count = g.kernel * g.kernel;
    for (int64_t c = 0; c < g.c_out; ++c)
        for (int64_t tap = 0; tap < count; ++tap) to[c * count + tap] = sums[tap * g.lanes + c];
    return {grad_x, grad_weight};
}

// exp(-x * x / 2) by a polynomial for the fraction of the power of two (degree 5, relative error 3e-6).
inline float bell(float x) {
    float power = x * x * -0.72134752f;
    power = power < -120.0f ? -120.0f : power;
    const float whole = std::floor(power);
    const float part = power - whole;
    const float fraction = 1.0f + part * (0.69315308f + part * (0.24015361f + part * (0.05582624f + part * (0.00898934f + part * 0.00187758f))));
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return fraction * scale;
}

// The normal distribution function by Abramowitz and Stegun 7.1.26, given bell(x).
inline float normal_cdf(float x, float bell_x) {
    const float z = std::fabs(x) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    const float tail = 0.5f * bell_x * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return x < 0 ? tail : 1.0f - tail;
}

torch::Tensor gelu_forward(const torch::Tensor& x) {
    auto y = torch::empty_like(x);
    const uint16_t* from = bits_of(x);
    uint16_t* to = bits_of(y);
    const int64_t count = x.numel();
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        const float value = widen(from[i]);
        to[i] = narrow(value * normal_cdf(value, bell(value)));
    }
    return y;
}

torch::Tensor gelu_backward(const torch::Tensor& grad, const torch::Tensor& x) {
    auto out = torch::empty_like(x);
    const uint16_t *from = bits_of(x), *gradient = bits_of(grad);
    uint16_t* to = bits_of(out);
    const int64_t count = x.numel();
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        const float value = widen(from[i]), density = bell(value);
        to[i] = narrow(widen(gradient[i]) * (normal_cdf(value, density) + value * density * 0.39894228f));
    }
    return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("depthwise_forward", &depthwise_forward);
    m.def("depthwise_backward", &depthwise_backward);
    m.def("gelu_forward", &gelu_forward);
    m.def("gelu_backward", &gelu_backward);
}
