#include "flexkv/plan/prefill_cost.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace flexkv::plan {
namespace {

constexpr double kForget = 0.97;  // what a step counts after the next one
// Units in which the unknowns are of a like size: a step of some thousand tokens takes some milliseconds.
constexpr std::array<double, 3> kScale = {1, 1e3, 1e6};
// Pulls what steps do not tell apart towards zero. Of each unknown's own size: prompts may be short.
constexpr double kRidge = 1e-3;

// Gauss elimination with pivoting. The matrix is positive definite.
std::array<double, 3> solve(std::array<std::array<double, 3>, 3> matrix, std::array<double, 3> right) {
  for (std::size_t column = 0; column < 3; ++column) {
    std::size_t pivot = column;
    for (std::size_t row = column + 1; row < 3; ++row) {
      if (std::abs(matrix[row][column]) > std::abs(matrix[pivot][column])) pivot = row;
    }
    std::swap(matrix[column], matrix[pivot]);
    std::swap(right[column], right[pivot]);
    for (std::size_t row = column + 1; row < 3; ++row) {
      const double factor = matrix[row][column] / matrix[column][column];
      for (std::size_t i = column; i < 3; ++i) matrix[row][i] -= factor * matrix[column][i];
      right[row] -= factor * right[column];
    }
  }
  std::array<double, 3> result{};
  for (std::size_t row = 3; row-- > 0;) {
    double sum = right[row];
    for (std::size_t i = row + 1; i < 3; ++i) sum -= matrix[row][i] * result[i];
    result[row] = sum / matrix[row][row];
  }
  return result;
}

}  // namespace

void PrefillCost::observe(std::uint32_t tokens, double pairs, Nanos duration) {
  if (tokens < kTokensMin || duration <= 0) return;
  const Vector features = {1, tokens / kScale[1], pairs / kScale[2]};
  const auto measured = static_cast<double>(duration);
  double weight = 1 / (features[1] + 1);  // large steps vary more
  if (steps_ >= kStepsMin) {
    const double expected = time_.fixed + time_.per_token * tokens + time_.per_pair * pairs;
    if (measured > 3 * expected) weight *= 0.05;
  }
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t j = 0; j < 3; ++j) {
      moments_[i][j] = moments_[i][j] * kForget + weight * features[i] * features[j];
    }
    products_[i] = products_[i] * kForget + weight * features[i] * measured;
  }
  ++steps_;
  step_tokens_ = std::max(step_tokens_, tokens);
  fit();
}

// With what turned out negative held at zero: no step has a negative part.
void PrefillCost::fit() {
  std::array<bool, 3> held{};
  Vector result{};
  for (int round = 0; round < 3; ++round) {
    auto matrix = moments_;
    auto right = products_;
    for (std::size_t i = 0; i < 3; ++i) {
      matrix[i][i] *= 1 + kRidge;
      if (!held[i]) continue;
      matrix[i] = {};
      matrix[i][i] = 1;
      right[i] = 0;
    }
    result = solve(matrix, right);
    const auto lowest = static_cast<std::size_t>(std::ranges::min_element(result) - result.begin());
    if (result[lowest] >= 0) break;
    held[lowest] = true;
    result[lowest] = 0;
  }
  for (double& value : result) value = std::max(value, 0.0);
  time_ = {result[0] / kScale[0], result[1] / kScale[1], result[2] / kScale[2],
           static_cast<double>(step_tokens_)};
}

}  // namespace flexkv::plan
