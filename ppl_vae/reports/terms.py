"""Terms: a sentence for each word of a report that a student may not know, the only source for pages and glossaries."""

import re
from collections.abc import Iterator, Mapping

TERMS: Mapping[str, tuple[str, str]] = {  # how it is written, as a regular expression, and the sentence
    "ELBO": (
        r"ELBO",
        "Evidence lower bound, E_q[log p(x, z) - log q(z | x)]: what training raises. It lies below log p(x) by the KL "
        "divergence of the guide to the exact posterior.",
    ),
    "log evidence": (
        r"(?:exact )?log evidence|log p\(x\)",
        "Log probability, or log density, that the model gives a datum, with its latent variables averaged out; higher "
        "is better.",
    ),
    "nats": (
        r"nats?\b",
        "Unit of information with natural logarithms; one nat is 1.44 bits. A datum one nat higher is 2.7 times as "
        "probable.",
    ),
    "lower bound": (
        r"lower bound",
        "A figure that the true value reaches or exceeds on average; how far it lies above is not known, so it has no "
        "error.",
    ),
    "estimate": (r"estimate", "A figure whose error is known: the true value lies within two errors 19 times of 20."),
    "closed form": (r"closed[- ]form", "Computed by a formula, without any draws, and so without Monte Carlo error."),
    "standard error": (
        r"[Ss]tandard errors?",
        "How far a mean over these data typically lies from the mean over all data of their kind.",
    ),
    "Monte Carlo error": (
        r"Monte Carlo(?: error)?",
        "Standard error that comes from using random draws; four times as many draws halve it.",
    ),
    "importance sampling": (
        r"[Ii]mportance (?:sampling|samples?|weights?)",
        "Draws from the guide, each weighted by p(x, z) / q(z | x), whose mean weight estimates p(x).",
    ),
    "prior": (r"prior", "Distribution p(z) of the latent variables before a datum is seen."),
    "likelihood": (r"likelihood", "Distribution p(x | z) of a datum whose latent variables are known."),
    "posterior": (
        r"(?:exact |reference )?posterior",
        "Distribution p(z | x) of the latent variables once the datum is seen.",
    ),
    "guide": (
        r"guide|approximate posterior",
        "The approximate posterior q(z | x) that is trained to be near the exact one; in a VAE, the encoder.",
    ),
    "latent variables": (
        r"latent(?: variable)?s?\b",
        "What the model supposes behind a datum and nobody observes: the code z.",
    ),
    "rate": (
        r"rates?\b",
        "KL divergence of the guide to the prior: how many nats the code says about a datum. Minus the ELBO is rate "
        "plus distortion.",
    ),
    "distortion": (r"distortion", "-E log p(x | z) under the guide: how badly a datum is explained by its own code."),
    "KL divergence": (
        r"KL(?: divergence)?\b",
        "How far one distribution is from another, in nats; 0 only if they are the same.",
    ),
    "PPCA": (
        r"PPCA",
        "Probabilistic principal component analysis: the linear-Gaussian model, whose best fit is known exactly. A "
        "deeper model should do better.",
    ),
    "bits per dimension": (r"bits per dimension", "-log2 p(x) divided by the number of features; lower is better."),
    "active latents": (
        r"[Aa]ctive latents",
        "Latent variables whose posterior mean varies over the data (variance above 0.01).",
    ),
    "collapsed": (
        r"collaps(?:ed?|ing)",
        "A latent variable that the guide ignores, since its posterior equals the prior for every datum.",
    ),
    "amortization": (
        r"amorti[sz]ation",
        "One network serves all data, in place of a fit to each; what that loses is the amortization gap.",
    ),
    "effective samples": (
        r"[Ee]ffective samples",
        "How many equally weighted draws the weighted ones are worth.",
    ),
    "tail shape k": (
        r"tail shapes?(?: k)?|k-hat",
        "Pareto k of the largest importance weights; above 0.5 their variance may be infinite, above 0.7 their mean is "
        "unreliable.",
    ),
    "jackknife": (r"jackknife", "Leaving out each sample in turn, to remove the first-order bias of an estimate."),
    "bias": (r"\bbias(?:ed)?\b", "Mean distance of an estimate from the truth, which more data of its kind leave."),
    "calibrated": (
        r"(?:mis)?calibrat(?:ed|ion)",
        "Regions of 90 % hold the truth 90 times of 100, on data drawn from the model.",
    ),
    "expected coverage": (
        r"(?:expected )?coverage",
        "Share of simulated data whose true latents lie in the guide's region of a given probability.",
    ),
    "predictive check": (
        r"[Pp]redictive checks?",
        "Data drawn from the fitted model are compared with the real ones, one statistic at a time.",
    ),
    "p-value": (
        r"p-values?|\bp = ",
        "Probability of a result at least as extreme if there were no fault; small ones speak against the model.",
    ),
    "held-out": (r"held[- ]out", "Data that were not used in training."),
    "validation": (
        r"validation",
        "Part of the data set aside from training, by which the best epoch or setting is chosen.",
    ),
    "epoch": (r"epochs?\b", "One pass over the training data."),
    "seed": (r"seeds?\b", "Number that fixes all random draws, so that a run can be repeated exactly."),
    "R-hat": (r"R-hat", "Compares chains of a sampler with each other; above 1.01 they have not met."),
    "annealing": (
        r"[Aa]nneal(?:ing|ed)",
        "Moving draws from prior to posterior in many small steps, to weigh them without relying on the guide.",
    ),
    "paired": (r"[Pp]aired", "Differences are taken datum by datum, so that what is common to both drops out."),
    "sd": (r"\bsd\b|standard deviations?", "Standard deviation: typical distance from the mean."),
}
_ANY = re.compile(rf"(?<![\w-])(?:{'|'.join(f'(?P<t{i}>{how})' for i, (how, _) in enumerate(TERMS.values()))})")


def split(text: str) -> Iterator[tuple[str, str | None]]:
    """Split a text into parts, each with the term that it names, or None."""
    end = 0
    for match in _ANY.finditer(text):
        yield text[end : match.start()], None
        yield match[0], list(TERMS)[int(str(match.lastgroup)[1:])]
        end = match.end()
    yield text[end:], None
