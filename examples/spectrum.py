"""The fifty largest eigenvalues of the Hessian after SGD, SAM and BSAM.

python examples/spectrum.py
"""

import sys

from training import LOSS, OPTIMIZERS, QUARTER, error, panels, picture, save, trained

from bsam_fused import sharpness

PICTURE = picture(__file__, __doc__)


def show(products: int) -> None:
    """Print how many Hessian products there have been."""
    print(f"\r{products} products", end="", file=sys.stderr)


spectra = {}
for name in OPTIMIZERS:
    net = trained(name)
    spectra[name] = sharpness.hessian_eigenvalues(net, LOSS, QUARTER, 50, tol=1e-3, progress=show)
    trace = sharpness.hessian_trace(net, LOSS, QUARTER, tol=0.03)
    print(
        f"\r{name}: eigenvalue 1 {spectra[name][0]:.2f}, 50 {spectra[name][-1]:.3f}; "
        f"trace {trace.value:.1f} ± {trace.standard_error:.1f}; test error {error(net):.1f} %"
    )
figure, axes = panels(1, 5.5)
sharpness.plot_spectrum(spectra, axes)
save(figure, PICTURE)
