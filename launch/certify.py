"""Runs every method on models with a planted answer, and scores what it finds.

python -m launch.certify --seeds=5 --out=out/certify
"""

from jaxmed.report import certificate
from jaxmed.runs import certify
from jaxmed.runs.certify import CertifySettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(
        flags.of(CertifySettings), lambda settings: certificate.lines(certify.run(settings))
    )


if __name__ == "__main__":
    main()
