# Cloud TPUs, one container per host. Chips and the names of the other hosts are found through the host.
#   docker build -f docker/tpu.Dockerfile -t esft-jax:tpu .
#   docker run --privileged --network host --shm-size 16g -v "$PWD:/work" esft-jax:tpu train run.yaml --distributed
FROM python:3.13-slim
COPY . /source
RUN pip install --no-cache-dir "/source[tpu]" && rm -r /source
WORKDIR /work
ENTRYPOINT ["esft"]
