"""Pictures of a fit. Each function returns a matplotlib `Figure`."""

from flowme.plots.checks import residuals, vpc
from flowme.plots.effects import density_bands, random_effects
from flowme.plots.fits import convergence, individual_fits, profile

__all__ = [
    "convergence",
    "density_bands",
    "individual_fits",
    "profile",
    "random_effects",
    "residuals",
    "vpc",
]
