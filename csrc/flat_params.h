// FlatParams: the parameters of one device and dtype, and the flat buffers that belong to them.
//
// The contract of every method is written once, for all backends, in bsam_fused/ops/contract.py. Here is what
// does not depend on the device: parameters, gradients read and taken, buffers, what a phase does in which
// order. What runs over the elements is a device's own: cpu_flat_params.h, cuda_flat_params.h. Gradients are read
// here and not passed from Python, where lists of tensors would cost more than the work on them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "built.h"
#include "flat.h"
#include "groups.h"

namespace bsam {

// The flat buffers.
constexpr char kSaved[] = "saved";
constexpr char kDirection[] = "direction";    // where `merge` leaves d
constexpr char kRemembered[] = "remembered";  // what the history is to be once a base has made its own step
constexpr char kMasterWeight[] = "master_weight";
constexpr char kMomentumBuffer[] = "momentum_buffer";
constexpr char kExpAvg[] = "exp_avg";
constexpr char kExpAvgSq[] = "exp_avg_sq";

// What steps remember: Friendly SAM's, and LookSAM's.
constexpr char kAverage[] = "gradient_average";
constexpr char kOrthogonal[] = "orthogonal_gradient";

inline const char* history_of(Rule rule) { return rule == Rule::friendly ? kAverage : kOrthogonal; }

namespace py = pybind11;

// Thrown where a parameter or its gradient cannot be worked with; a function of contract.py finds the words.
struct BadParameter : std::exception {
  enum Why { kRejected, kMemory, kShape };
  BadParameter(Why reason, size_t i) : why(reason), index(i) {}

  Why why;
  size_t index;
};

class FlatParams : public Built {
 public:
  template <class Group>
  using Options = std::vector<std::array<double, Group::kOptions>>;  // an entry a param group

  using Rows = std::vector<std::vector<double>>;  // likewise, of any kind

  // How the direction is mixed: a Rule, and the numbers of the groups.
  using Mixing = std::pair<int64_t, Options<RuleGroup>>;

  // `seed`: of stochastic rounding, for 16-bit parameters; none: to nearest. `exempt`: from the perturbations.
  FlatParams(std::vector<py::object> params, std::vector<std::pair<int64_t, int64_t>> places,
             std::optional<uint32_t> seed, bool exempt);
  virtual ~FlatParams() = default;

  void read_gradients();
  void copy_shared(const std::vector<const FlatParams*>& beside);
  void begin_plain(const Mixing& mixing);
  void join(const Mixing& mixing, bool descended);
  void clear_gradients();
  void square_norm(int64_t slot, const Options<RadiusGroup>& radii);
  void mix(const Options<RadiusGroup>& radii, const Mixing& mixing);
  void direction_sums();
  void ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps, const Mixing& mixing);
  void descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps);
  std::vector<int64_t> beginning(const std::vector<bool>& stateful) const;
  void begin_state(const std::vector<int64_t>& members);
  void retract_state(int64_t i);
  // An update in two parts: all that can raise, and all that writes.
  template <class Group>
  void prepare_update(const at::Tensor& sums, const Options<Group>& groups, double max_norm);
  template <class Group>
  void make_update(const at::Tensor& sums, const Options<Group>& groups, bool from_saved, double max_norm);
  template <class Group>
  void update(const at::Tensor& sums, const Options<Group>& groups, bool from_saved, double max_norm) {
    prepare_update<Group>(sums, groups, max_norm);
    make_update<Group>(sums, groups, from_saved, max_norm);
  }
  bool combine(const at::Tensor& sums, bool from_saved, double max_norm);
  void remember();
  at::Tensor merge(const at::Tensor& sums, double share);
  virtual void write_options(const std::vector<Rows>& tables);
  void restore();
  void release();
  void show_w(bool at_w);

  std::vector<at::Tensor> state(const std::string& key);
  void drop_state();
  int64_t extra_bytes() const;

  const std::vector<py::object>& params() const { return params_; }
  const std::vector<std::pair<int64_t, int64_t>>& places() const { return places_; }
  at::Tensor sums() const { return sums_; }
  at::Tensor step_count() const { return step_count_; }
  at::Tensor skipped() const { return skipped_; }
  bool updated() const { return updated_; }
  at::Device device() const { return device_; }
  at::ScalarType dtype() const { return dtype_; }

  double limit;       // what no number of a step may exceed
  bool busy = false;  // a method runs, perhaps without Python's lock

 protected:
  // Small and in order of use: with hundreds of tiny tensors, cache misses are what a phase is made of.
  struct Entry {
    char* w = nullptr;                          // the weights, in the strides of the flat buffers
    const char* now = nullptr;                  // this pass's gradient, in the same strides; null without one
    char* g = nullptr;                          // what is kept: g, or g + g_max, likewise; in `taken` or `own`
    char* copy = nullptr;                       // where g is copied to, the elements of `own`
    const c10::TensorImpl* tensor = nullptr;    // what the parameter was when gradients were read, and
    const c10::TensorImpl* gradient = nullptr;  // what its .grad was: others may exchange them
    int32_t group, dim, shape;                  // `shape`: where in shapes_ it is
    bool dense;                                 // its elements fill its storage: worked on in place
    bool copying = false;                       // the gradient of this pass is taken by copying it into g
    bool staging = false;                       // it is read in `staged`
    bool perturbed = false;                     // w is not w, but saved is
    bool ascended = false;                      // had a gradient in the first pass of this step
    bool member = false;                        // had one in some pass
    bool counted = false;                       // and the base optimizer keeps state for it
    bool begun = false;                         // whose state Python has been told of
    at::Tensor taken;                           // holds g, where that is the gradient itself
    at::Tensor own;                             // where it is not, but a copy: holds g, and stays for the next steps
    at::Tensor staged;                          // holds `now` where the gradient itself cannot be read in place
    at::Tensor packed;                          // where not dense: its elements, packed
  };

  enum Use { kAscending, kDescending, kUpdating, kMixing, kUses };  // of options

  // What a device does in a phase, over the elements of all entries. ascend saves w, moves it and notes what it
  // moved; ascend and descend also copy the gradients that are `copying`.
  virtual void run_square_norm(int64_t slot, const Options<RadiusGroup>& radii) = 0;
  virtual void run_mix(const Options<RadiusGroup>& radii) = 0;
  virtual void run_direction_sums() = 0;
  virtual void run_ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) = 0;
  virtual void run_descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) = 0;
  virtual void run_update(const at::Tensor& sums, const Options<SgdGroup>& groups, bool from_saved,
                          double max_norm) = 0;
  virtual void run_update(const at::Tensor& sums, const Options<AdamGroup>& groups, bool from_saved,
                          double max_norm) = 0;
  virtual void run_direction(const at::Tensor& sums, double max_norm) = 0;  // g = d, of all that have a g
  // The history of those that `remembers`, into the flat buffer `to`; `ahead`: how many steps step_count is behind.
  virtual void run_remember(const at::Tensor& sums, double max_norm, char* to, int64_t ahead) = 0;
  virtual void run_restore() = 0;  // saved -> w, of the perturbed that have a w
  // A gradient is let go of as soon as its launch is under way: the work before it must be done until its memory is
  // given to the stream that it came from.
  virtual void keep_until_read(const at::Tensor& /*grad*/) const {}
  // What can raise as a phase's options come to the device, before anything is written.
  virtual void prepare_options(Use, const double* /*values*/, size_t /*count*/) {}
  // Likewise, as the kernels that an update launches come there.
  virtual void prepare_kernels(const Options<SgdGroup>&) {}
  virtual void prepare_kernels(const Options<AdamGroup>&) {}
  // The sums, where the host can read them without waiting, else null: the update itself then looks.
  virtual const double* on_host(const at::Tensor& sums) const = 0;

  // The address of byte `at`, without a tensor none.
  static char* data(const at::Tensor& t, int64_t at) {
    return t.defined() ? static_cast<char*>(t.unsafeGetTensorImpl()->mutable_data()) + at : nullptr;
  }
  // What an ascend that leaves the weights has to do.
  void copy_gradients();
  virtual at::Tensor new_buffer(int64_t numel, at::ScalarType dtype) const;
  char* buffer(const std::string& key);
  // Float32, where 16-bit parameters have them: from when somebody first asks for their state.
  float* master_weights() { return reinterpret_cast<float*>(buffer_if_any(kMasterWeight)); }
  char* buffer_if_any(const std::string& key) { return buffers_.count(key) ? buffer(key) : nullptr; }

  std::vector<py::object> params_;
  std::vector<std::pair<int64_t, int64_t>> places_;
  at::Device device_;
  at::ScalarType dtype_;
  int64_t itemsize_;
  FlatIndex index_;
  std::vector<Entry> entries_;
  int64_t groups_ = 0;          // that options are needed of: one more than the last that a parameter is in
  std::vector<uint32_t> keys_;  // tensor_key of each parameter; none without stochastic rounding
  at::Tensor sums_, steps_, skipped_, step_count_;
  // How this step's direction is mixed, and whether its sums are there.
  Rule rule_ = Rule::last_alone;
  Options<RuleGroup> numbers_;
  bool summed_ = false;

  // Whether a tensor has a gradient kept of the first pass, and one of the last.
  static bool has_both(const Entry& e) { return e.ascended && e.now; }
  // Whether a tensor's history is written: Friendly SAM's where it has a q.
  bool has_memory(const Entry& e) const { return rule_ == Rule::friendly ? e.g != nullptr : e.member; }
  RuleGroup numbers_of(const Entry& e) const {
    return numbers_.empty() ? RuleGroup{} : RuleGroup::from(numbers_[e.group].data());
  }
  Direction direction(double max_norm) const {
    return {rule_, summed_, max_norm, limit, numbers_.empty() ? 0 : RuleGroup::from(numbers_[0].data()).largest};
  }

  bool exempt_;  // nothing is perturbed here

 private:
  enum class Phase { kRest, kPlain, kAscended, kDescended, kCombined };

  // The parameter's tensor and .grad, of now: no reference to them is kept.
  const at::Tensor& param(size_t i) const { return THPVariable_Unpack(params_[i].ptr()); }
  at::Tensor& gradient(size_t i) const {
    auto* known = static_cast<torch::autograd::AutogradMeta*>(param(i).unsafeGetTensorImpl()->autograd_meta());
    return known ? known->grad_ : param(i).mutable_grad();
  }
  at::IntArrayRef sizes(size_t i) const;
  at::IntArrayRef strides(size_t i) const;  // in the flat buffers
  at::Tensor empty(size_t i) const;
  bool unmoved(size_t i) const;
  bool fits(size_t i) const;

  void check_groups(size_t groups) const;
  void check_sums(const at::Tensor& sums) const;
  void check_own() const;
  void check_noted() const;
  void check_saved() const;
  void check_mixing(const Mixing& mixing) const;
  void begin_last(const at::Tensor& sums) const;

  void expect(size_t i) const;
  void read_gradient(size_t i);
  void stage(size_t i, const at::Tensor& grad);
  bool is_ours(const c10::StorageImpl* storage);
  static std::vector<const c10::StorageImpl*> storages_of(const std::vector<const FlatParams*>& flats);
  void read_weights(size_t i);
  void read_unmoved(size_t i);
  void wrote_weights(size_t i);
  void write(size_t i, const at::Tensor& from);

  // The phase of the last pass, which an update follows.
  Phase last_phase() const {
    if (rule_ == Rule::reused) return Phase::kPlain;
    return rule_ == Rule::bilateral ? Phase::kDescended : Phase::kAscended;
  }
  void mix_by(Rule rule, const Options<RuleGroup>& numbers);
  void prepare_mixing();
  void make_copy(size_t i);
  void make_room();
  void take_gradients();
  static void take(Entry& e, at::Tensor g);
  static at::Tensor give(Entry& e);
  void end_pass();
  void forget();
  void finish();
  bool is_skipped(const at::Tensor& sums, double max_norm) const;
  void skip();
  std::vector<at::Tensor> last_gradients(double factor) const;
  std::vector<at::Tensor> mixed_directions(const at::Tensor& sums, double max_norm);
  void complete_g();
  void own_history();
  void keep_history(const at::Tensor& sums, double max_norm);
  void save_rest();
  void write_saved();
  at::Tensor view(const std::string& key, size_t i);

  std::vector<int64_t> shapes_;                // sizes and strides of every parameter as recorded, end to end
  std::map<std::string, at::Tensor> buffers_;  // "saved", "direction", and the base optimizer's state
  std::vector<const c10::StorageImpl*> ours_;  // sorted, while gradients are read: storages that a phase may write
  c10::DeleterFnPtr deleter_;                  // of memory that torch allocated
  Phase phase_ = Phase::kRest;
  bool read_ = false;     // gradients were, since the last phase
  bool updated_ = false;  // the gradients read last are in the weights, or were given up
  bool at_w_ = false;     // saved holds the perturbed weights meanwhile
};

Dtype element_type(at::ScalarType dtype);

}  // namespace bsam
