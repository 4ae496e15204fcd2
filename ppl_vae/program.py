"""Where run directories of old import from; the names are those of `ppl_vae.programs`."""

from ppl_vae.programs.program import Program, PyroPair, load_program, unique_name
from ppl_vae.programs.vae import VAE

__all__ = ["VAE", "Program", "PyroPair", "load_program", "unique_name"]
