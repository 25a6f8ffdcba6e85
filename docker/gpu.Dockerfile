# NVIDIA GPUs. The pip packages bring CUDA along; the host needs its driver, and the NVIDIA Container Toolkit.
#   docker build -f docker/gpu.Dockerfile -t esft-jax:gpu .
#   docker run --gpus all -v "$PWD:/work" esft-jax:gpu train run.yaml
FROM python:3.13-slim
COPY . /source
RUN pip install --no-cache-dir "/source[cuda]" && rm -r /source
WORKDIR /work
ENTRYPOINT ["esft"]
