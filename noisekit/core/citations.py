"""The papers behind measures, noise scales and experiments, as BibTeX."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Citation:
    """One paper.

    Attributes:
        key: Its BibTeX key.
        short: Authors and year as named in a sentence.
        authors: All of them, in BibTeX's format.
        title: The title.
        year: Of the venue, where there is one.
        venue: Where it appeared; empty for a preprint.
        arxiv: Number of the preprint; empty where there is none.
    """

    key: str
    short: str
    authors: str
    title: str
    year: int
    venue: str = ""
    arxiv: str = ""

    @property
    def bibtex(self) -> str:
        """The entry."""
        kind = "inproceedings" if self.venue.startswith("Proc") else "article"
        where = "booktitle" if kind == "inproceedings" else "journal"
        fields = {
            "author": self.authors,
            "title": f"{{{self.title}}}",
            "year": str(self.year),
            where: self.venue or f"arXiv preprint arXiv:{self.arxiv}",
        }
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"}
        lines = [f"  {name} = {{{text}}}," for name, text in fields.items()]
        return "\n".join([f"@{kind}{{{self.key},", *lines, "}"])


_ICLR = "Proceedings of the International Conference on Learning Representations"
_ICML = "Proceedings of the International Conference on Machine Learning"

CITATIONS: Mapping[str, Citation] = MappingProxyType(
    {
        citation.key: citation
        for citation in (
            Citation(
                "keskar2017large",
                "Keskar et al. 2017",
                "Keskar, Nitish Shirish and Mudigere, Dheevatsa and Nocedal, Jorge and "
                "Smelyanskiy, Mikhail and Tang, Ping Tak Peter",
                "On Large-Batch Training for Deep Learning: Generalization Gap and "
                "Sharp Minima",
                2017,
                _ICLR,
                "1609.04836",
            ),
            Citation(
                "mccandlish2018empirical",
                "McCandlish et al. 2018",
                "McCandlish, Sam and Kaplan, Jared and Amodei, Dario and {OpenAI Dota "
                "Team}",
                "An Empirical Model of Large-Batch Training",
                2018,
                arxiv="1812.06162",
            ),
            Citation(
                "hoffer2017train",
                "Hoffer et al. 2017",
                "Hoffer, Elad and Hubara, Itay and Soudry, Daniel",
                "Train Longer, Generalize Better: Closing the Generalization Gap in "
                "Large Batch Training of Neural Networks",
                2017,
                "Proceedings of Advances in Neural Information Processing Systems",
                "1705.08741",
            ),
            Citation(
                "jastrzebski2018three",
                "Jastrzebski et al. 2018",
                "Jastrz{\\k{e}}bski, Stanis{\\l}aw and Kenton, Zachary and Arpit, "
                "Devansh and Ballas, Nicolas and Fischer, Asja and Bengio, Yoshua and "
                "Storkey, Amos",
                "Three Factors Influencing Minima in SGD",
                2018,
                arxiv="1711.04623",
            ),
            Citation(
                "balles2017coupling",
                "Balles, Romero and Hennig 2017",
                "Balles, Lukas and Romero, Javier and Hennig, Philipp",
                "Coupling Adaptive Batch Sizes with Learning Rates",
                2017,
                "Proceedings of the Conference on Uncertainty in Artificial "
                "Intelligence",
                "1612.05086",
            ),
            Citation(
                "devarakonda2017adabatch",
                "Devarakonda et al. 2017",
                "Devarakonda, Aditya and Naumov, Maxim and Garland, Michael",
                "AdaBatch: Adaptive Batch Sizes for Training Deep Neural Networks",
                2017,
                arxiv="1712.02029",
            ),
            Citation(
                "smith2018dont",
                "Smith et al. 2018",
                "Smith, Samuel L. and Kindermans, Pieter-Jan and Ying, Chris and Le, "
                "Quoc V.",
                "Don't Decay the Learning Rate, Increase the Batch Size",
                2018,
                _ICLR,
                "1711.00489",
            ),
            Citation(
                "byrd2012sample",
                "Byrd et al. 2012",
                "Byrd, Richard H. and Chin, Gillian M. and Nocedal, Jorge and Wu, "
                "Yuchen",
                "Sample Size Selection in Optimization Methods for Machine Learning",
                2012,
                "Mathematical Programming 134",
            ),
            Citation(
                "bollapragada2018adaptive",
                "Bollapragada, Byrd and Nocedal 2018",
                "Bollapragada, Raghu and Byrd, Richard and Nocedal, Jorge",
                "Adaptive Sampling Strategies for Stochastic Optimization",
                2018,
                "SIAM Journal on Optimization 28",
                "1710.11258",
            ),
            Citation(
                "umeda2025adaptive",
                "Umeda and Iiduka 2025",
                "Umeda, Hikaru and Iiduka, Hideaki",
                "Adaptive Batch Size and Learning Rate Scheduler for Stochastic "
                "Gradient Descent Based on Minimization of Stochastic First-order "
                "Oracle Complexity",
                2025,
                arxiv="2508.05302",
            ),
            Citation(
                "foret2021sharpness",
                "Foret et al. 2021",
                "Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, "
                "Behnam",
                "Sharpness-Aware Minimization for Efficiently Improving Generalization",
                2021,
                _ICLR,
                "2010.01412",
            ),
            Citation(
                "kwon2021asam",
                "Kwon et al. 2021",
                "Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon",
                "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant "
                "Learning of Deep Neural Networks",
                2021,
                _ICML,
                "2102.11600",
            ),
            Citation(
                "andriushchenko2023modern",
                "Andriushchenko et al. 2023",
                'Andriushchenko, Maksym and Croce, Francesco and M{\\"u}ller, '
                "Maximilian and Hein, Matthias and Flammarion, Nicolas",
                "A Modern Look at the Relationship between Sharpness and "
                "Generalization",
                2023,
                _ICML,
                "2302.07011",
            ),
            Citation(
                "jiang2020fantastic",
                "Jiang et al. 2020",
                "Jiang, Yiding and Neyshabur, Behnam and Mobahi, Hossein and Krishnan, "
                "Dilip and Bengio, Samy",
                "Fantastic Generalization Measures and Where to Find Them",
                2020,
                _ICLR,
                "1912.02178",
            ),
            Citation(
                "liang2019fisher",
                "Liang et al. 2019",
                "Liang, Tengyuan and Poggio, Tomaso and Rakhlin, Alexander and Stokes, "
                "James",
                "Fisher-Rao Metric, Geometry, and Complexity of Neural Networks",
                2019,
                "Proceedings of the International Conference on Artificial "
                "Intelligence and Statistics",
                "1711.01530",
            ),
            Citation(
                "petzka2021relative",
                "Petzka et al. 2021",
                "Petzka, Henning and Kamp, Michael and Adilova, Linara and "
                "Sminchisescu, Cristian and Boley, Mario",
                "Relative Flatness and Generalization",
                2021,
                "Advances in Neural Information Processing Systems",
                "2001.00939",
            ),
            Citation(
                "cohen2021gradient",
                "Cohen et al. 2021",
                "Cohen, Jeremy M. and Kaur, Simran and Li, Yuanzhi and Kolter, J. Zico "
                "and Talwalkar, Ameet",
                "Gradient Descent on Neural Networks Typically Occurs at the Edge of "
                "Stability",
                2021,
                _ICLR,
                "2103.00065",
            ),
            Citation(
                "andreyev2024edge",
                "Andreyev and Beneventano 2024",
                "Andreyev, Arseniy and Beneventano, Pierfrancesco",
                "Edge of Stochastic Stability: Revisiting the Edge of Stability for "
                "SGD",
                2024,
                arxiv="2412.20553",
            ),
            Citation(
                "yao2020pyhessian",
                "Yao et al. 2020",
                "Yao, Zhewei and Gholami, Amir and Keutzer, Kurt and Mahoney, "
                "Michael W.",
                "PyHessian: Neural Networks Through the Lens of the Hessian",
                2020,
                arxiv="1912.07145",
            ),
            Citation(
                "hutchinson1989stochastic",
                "Hutchinson 1989",
                "Hutchinson, Michael F.",
                "A Stochastic Estimator of the Trace of the Influence Matrix for "
                "Laplacian Smoothing Splines",
                1989,
                "Communications in Statistics - Simulation and Computation",
            ),
            Citation(
                "maddox2020rethinking",
                "Maddox et al. 2020",
                "Maddox, Wesley J. and Benton, Gregory and Wilson, Andrew Gordon",
                "Rethinking Parameter Counting in Deep Models: Effective "
                "Dimensionality Revisited",
                2020,
                arxiv="2003.02139",
            ),
            Citation(
                "meyer2021hutch",
                "Meyer et al. 2021",
                "Meyer, Raphael A. and Musco, Cameron and Musco, Christopher and "
                "Woodruff, David P.",
                "Hutch++: Optimal Stochastic Trace Estimation",
                2021,
                "Proceedings of the Symposium on Simplicity in Algorithms",
                "2010.09649",
            ),
            Citation(
                "wu2000thick",
                "Wu and Simon 2000",
                "Wu, Kesheng and Simon, Horst",
                "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems",
                2000,
                "SIAM Journal on Matrix Analysis and Applications",
            ),
            Citation(
                "laarhoven2017l2",
                "van Laarhoven 2017",
                "van Laarhoven, Twan",
                "L2 Regularization versus Batch and Weight Normalization",
                2017,
                arxiv="1706.05350",
            ),
            Citation(
                "dinh2017sharp",
                "Dinh et al. 2017",
                "Dinh, Laurent and Pascanu, Razvan and Bengio, Samy and Bengio, Yoshua",
                "Sharp Minima Can Generalize For Deep Nets",
                2017,
                _ICML,
                "1703.04933",
            ),
        )
    }
)


def cited_in(text: str) -> list[Citation]:
    """Return the papers whose arXiv numbers occur in ``text``."""
    return [c for c in CITATIONS.values() if c.arxiv and f"arXiv:{c.arxiv}" in text]


def bibtex(keys: Iterable[str]) -> str:
    """Return the entries of ``keys``, each once, in alphabetical order."""
    return "\n\n".join(CITATIONS[key].bibtex for key in sorted(set(keys)))
