// The kernels of cosine, included by each simd_*.cpp after formats.inl. With c an output and e the vector of its target:
//
//   loss = 1 - cos(c, e) or |c - e|^2 / 2      dc = dloss (by_output c + by_target e)
//
// Two vectors of some hundred elements: once read they are in the first cache, and a loop over them is cheap. Where they lie in
// memory is what costs, and the vectors of a table lie anywhere.

inline bool is_hit(const Table& table, int64_t target) {
  return 0 <= target && target < table.vectors;
}

template <class T> void cosine_forward_of(const CosineForward& a, int64_t begin, int64_t end) {
  constexpr T smallest = std::numeric_limits<T>::min();
  const int64_t width = a.output.classes;
  std::vector<T> scratch(2 * width);
  for (int64_t n = begin; n < end; ++n) {
    T loss = std::numeric_limits<T>::quiet_NaN(), by_output = 0, by_target = 0;
    if (is_hit(a.table, a.target[n])) {
      const T* c = widened(a.output.data, a.output.dtype, a.output.start(n), width, scratch.data());
      const T* e = widened(a.table.data, a.table.dtype, a.target[n] * a.table.stride, width,
                           scratch.data() + width);
      if (a.normalize) {
        const T cc = sum_by_lanes<T>(width, [=](int64_t j) { return c[j] * c[j]; });
        const T ee = sum_by_lanes<T>(width, [=](int64_t j) { return e[j] * e[j]; });
        T similarity = 0;
        if (!(cc < smallest || ee < smallest)) {
          const T ce = sum_by_lanes<T>(width, [=](int64_t j) { return c[j] * e[j]; });
          // |c| / |c|^2 and not 1 / |c|: a sum of squares that overflows gives NaN, not 0
          by_target = -(std::sqrt(cc) / cc) * (std::sqrt(ee) / ee);
          similarity = -ce * by_target;
          by_output = similarity / cc;
        }
        loss = 1 - similarity;
      } else {
        loss = sum_by_lanes<T>(width, [=](int64_t j) { return (c[j] - e[j]) * (c[j] - e[j]); }) / 2;
        by_output = 1;
        by_target = -1;
      }
    }
    static_cast<T*>(a.loss)[n] = loss;
    static_cast<T*>(a.by_output)[n] = by_output;
    static_cast<T*>(a.by_target)[n] = by_target;
  }
}

template <class T> void cosine_backward_of(const CosineBackward& a, int64_t begin, int64_t end) {
  const int64_t width = a.output.classes;
  std::vector<T> scratch(2 * width), gradient(width);
  for (int64_t n = begin; n < end; ++n) {
    const T dloss = static_cast<const T*>(a.dloss)[n];
    const T by_output = static_cast<const T*>(a.by_output)[n];
    const T by_target = static_cast<const T*>(a.by_target)[n];
    if (dloss != 0 && by_target != 0 && is_hit(a.table, a.target[n])) {
      const T* c = widened(a.output.data, a.output.dtype, a.output.start(n), width, scratch.data());
      const T* e = widened(a.table.data, a.table.dtype, a.target[n] * a.table.stride, width,
                           scratch.data() + width);
      for (int64_t j = 0; j < width; ++j)
        gradient[j] = dloss * (by_output * c[j] + by_target * e[j]);
    } else {
      std::fill(gradient.begin(), gradient.end(), T{0});
    }
    round_row(gradient.data(), a.doutput, a.output.dtype, n * width, width);
  }
}

inline void cosine_forward(const CosineForward& a, int64_t begin, int64_t end) {
  if (a.output.dtype == Dtype::f64) return cosine_forward_of<double>(a, begin, end);
  cosine_forward_of<float>(a, begin, end);
}

inline void cosine_backward(const CosineBackward& a, int64_t begin, int64_t end) {
  if (a.output.dtype == Dtype::f64) return cosine_backward_of<double>(a, begin, end);
  cosine_backward_of<float>(a, begin, end);
}
