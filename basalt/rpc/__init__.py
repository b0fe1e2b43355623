"""gRPC stubs, generated from `proto/` and committed. To make them again, from the repository root:

python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. basalt/rpc/vision/v1/vision.proto
"""
